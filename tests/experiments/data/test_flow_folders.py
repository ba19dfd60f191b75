"""FlyingChairs and Sintel in their own layouts, written here in small."""

import numpy as np
import pytest
from PIL import Image

from experiments.data.flow_files import write_flo
from experiments.data.flow_folders import MissingFlowError, open_chairs, open_sintel


def write_image(path, rng, size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_flow(path, rng, size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    flow = rng.standard_normal((*size, 2)).astype(np.float32)
    write_flo(path, flow)
    return flow


def write_chairs(folder, marks="1121", *, seed=0):
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(1, len(marks) + 1):
        name = folder / "data" / f"{number:05d}_"
        examples.append(
            (
                write_image(name.with_name(f"{name.name}img1.ppm"), rng),
                write_image(name.with_name(f"{name.name}img2.ppm"), rng),
                write_flow(name.with_name(f"{name.name}flow.flo"), rng),
            )
        )
    (folder / "FlyingChairs_train_val.txt").write_text("\n".join(marks) + "\n")
    return examples


def write_sintel(folder, scenes):
    rng = np.random.default_rng(1)
    written = {}
    for scene, frames in scenes.items():
        for number in range(1, frames + 1):
            for rendering in ("clean", "final"):
                path = folder / "training" / rendering / scene / f"frame_{number:04d}.png"
                written[rendering, scene, number] = write_image(path, rng)
            if number < frames:
                path = folder / "training" / "flow" / scene / f"frame_{number:04d}.flo"
                written["flow", scene, number] = write_flow(path, rng)
    return written


def assert_same(example, expected):
    for found, written in zip(example, expected, strict=True):
        np.testing.assert_array_equal(found, written)


@pytest.mark.parametrize("beside", [True, False])
def test_chairs_come_in_the_official_split(beside, tmp_path):
    examples = write_chairs(tmp_path)
    if not beside:
        split = tmp_path / "FlyingChairs_train_val.txt"
        split.rename(tmp_path / "data" / split.name)
    train, validation = open_chairs(tmp_path, "train"), open_chairs(tmp_path, "validation")
    assert (len(train), len(validation)) == (3, 1)
    for index, at in enumerate((0, 1, 3)):
        assert_same(train[index], examples[at])
    assert_same(validation[0], examples[2])


def test_sintel_pairs_stay_within_their_scene(tmp_path):
    written = write_sintel(tmp_path, {"alley_1": 3, "bamboo_2": 2})
    for rendering in ("clean", "final"):
        pairs = open_sintel(tmp_path, rendering)
        assert len(pairs) == 3
        for index, (scene, at) in enumerate([("alley_1", 1), ("alley_1", 2), ("bamboo_2", 1)]):
            expected = (
                written[rendering, scene, at],
                written[rendering, scene, at + 1],
                written["flow", scene, at],
            )
            assert_same(pairs[index], expected)


def test_missing_data_sets_say_what_to_get(tmp_path):
    with pytest.raises(MissingFlowError, match=r"FlyingChairs\.zip"):
        open_chairs(tmp_path, "train")
    with pytest.raises(MissingFlowError, match=r"MPI-Sintel-complete\.zip"):
        open_sintel(tmp_path, "clean")


def test_missing_files_are_named(tmp_path):
    write_chairs(tmp_path / "chairs")
    (tmp_path / "chairs" / "data" / "00002_img2.ppm").unlink()
    with pytest.raises(MissingFlowError, match=r"00002_img2\.ppm is missing"):
        open_chairs(tmp_path / "chairs", "train")
    write_sintel(tmp_path / "sintel", {"alley_1": 3})
    (tmp_path / "sintel" / "training" / "flow" / "alley_1" / "frame_0002.flo").unlink()
    with pytest.raises(MissingFlowError, match=r"frame_0002\.flo is missing"):
        open_sintel(tmp_path / "sintel", "clean")


def test_a_split_of_another_length_is_refused(tmp_path):
    write_chairs(tmp_path)
    (tmp_path / "FlyingChairs_train_val.txt").write_text("1\n2\n")
    with pytest.raises(ValueError, match="has 2 lines, but there are 4 examples"):
        open_chairs(tmp_path, "train")
    (tmp_path / "FlyingChairs_train_val.txt").unlink()
    with pytest.raises(MissingFlowError, match="official split"):
        open_chairs(tmp_path, "train")


def test_damaged_and_unequal_files_are_named_when_read(tmp_path):
    write_chairs(tmp_path)
    pairs = open_chairs(tmp_path, "train")
    write_flow(tmp_path / "data" / "00001_flow.flo", np.random.default_rng(0), size=(6, 9))
    with pytest.raises(ValueError, match=r"00001_flow\.flo is 9 x 6 pixels"):
        pairs[0]
    path = tmp_path / "data" / "00002_img1.ppm"
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"00002_img1\.ppm"):
        pairs[1]
