"""`.flo` files there and back, and what is said about damaged ones."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from experiments.data.flow_files import is_known, read_flo, read_image, write_flo


@settings(max_examples=20, deadline=None)
@given(
    flow=st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
        lambda sides: arrays(np.float32, (*sides, 2), elements=st.floats(width=32))
    )
)
def test_what_is_written_is_read_back_bit_by_bit(flow, tmp_path_factory):
    path = tmp_path_factory.mktemp("flo") / "a.flo"
    write_flo(path, flow)
    assert read_flo(path).view(np.uint32).tolist() == flow.view(np.uint32).tolist()


def test_the_bytes_are_those_of_the_format(tmp_path):
    flow = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    write_flo(tmp_path / "a.flo", flow)
    expected = struct.pack("<fii", 202021.25, 3, 2) + struct.pack("<12f", *range(12))
    assert (tmp_path / "a.flo").read_bytes() == expected


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a .flo file"),
        (b"PIEX" + struct.pack("<ii", 1, 1) + bytes(8), "not a .flo file"),
        (b"PIEH" + bytes(3), "ends within its header"),
        (b"PIEH" + struct.pack("<ii", 0, 1), "broken header"),
        (b"PIEH" + struct.pack("<ii", -4, 2), "broken header"),
        (b"PIEH" + struct.pack("<ii", 2**31 - 1, 1), "broken header"),
        (b"PIEH" + struct.pack("<ii", 2, 2) + bytes(31), "damaged: 2 x 2 pixels make 44 bytes"),
        (b"PIEH" + struct.pack("<ii", 2, 2) + bytes(33), "got 45"),
    ],
)
def test_a_damaged_file_is_named(data, said, tmp_path):
    path = tmp_path / "bad.flo"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said) as error:
        read_flo(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3), (0, 4, 2)])
def test_only_fields_of_two_components_are_written(shape, tmp_path):
    with pytest.raises(ValueError, match="height, width, 2"):
        write_flo(tmp_path / "a.flo", np.zeros(shape))


def test_huge_and_undefined_flow_is_unknown():
    flow = np.array([[[0, 0], [1e9, 0], [1.1e9, 0], [0, np.nan], [-np.inf, 0]]], np.float32)
    assert is_known(flow).tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize("ending", ["ppm", "png"])
def test_images_are_read_as_they_were_written(ending, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / f"a.{ending}"
    Image.fromarray(pixels).save(path)
    np.testing.assert_array_equal(read_image(path), pixels)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="not a readable image") as error:
        read_image(path)
    assert str(path) in str(error.value)
