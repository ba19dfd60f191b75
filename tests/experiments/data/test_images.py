"""Augmentations against cases worked out by hand."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments.data import images
from tests.experiments.prepared import encode


def numbered(height, width):
    """An image in which every pixel is another."""
    pixels = np.arange(height * width, dtype=np.uint32).reshape(height, width)
    return np.stack([pixels % 256, pixels // 256, pixels * 0], axis=-1).astype(np.uint8)


class Draws:
    """A generator that returns what it is told, as a real one would."""

    def __init__(self, **values):
        self.values = {name: iter(value) for name, value in values.items()}

    def __getattr__(self, name):
        return lambda *_, **__: next(self.values[name])


@given(height=st.integers(1, 600), width=st.integers(1, 600), seed=st.integers(0, 2**32 - 1))
def test_random_crop_lies_inside_the_image(height, width, seed):
    box = images.random_crop_box(np.random.default_rng(seed), height, width)
    assert box.height >= 1
    assert box.width >= 1
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width


def test_random_crop_has_the_areas_and_ratios_of_the_recipe():
    rng = np.random.default_rng(0)
    boxes = [images.random_crop_box(rng, 1000, 1000) for _ in range(2000)]
    areas = np.array([box.height * box.width / 1e6 for box in boxes])
    ratios = np.array([box.width / box.height for box in boxes])
    assert 0.079 < areas.min() < 0.1
    assert 0.9 < areas.max() <= 1.0
    assert 0.745 < ratios.min() < 0.76
    assert 1.31 < ratios.max() < 1.34
    assert abs(np.log(ratios).mean()) < 0.01
    # Larger ones that do not fit are drawn again, which takes a little off the mean of 0.54.
    assert 0.45 < areas.mean() < 0.54


def test_random_crop_by_hand():
    # A quarter of 100 x 100 pixels at aspect 1: 50 x 50, at the place drawn.
    rng = Draws(uniform=[0.25, 0.0], integers=[7, 11])
    assert images.random_crop_box(rng, 100, 100) == (7, 11, 50, 50)


def test_random_crop_of_a_thin_image_falls_back_to_its_center():
    box = images.random_crop_box(np.random.default_rng(0), 10, 1000)
    assert box == (0, 494, 10, 13)
    assert images.random_crop_box(np.random.default_rng(0), 1000, 10) == (494, 0, 13, 10)


def test_crop_cuts_out_the_box_and_nothing_else():
    pixels = numbered(20, 30)
    box = images.Box(top=3, left=5, height=8, width=8)
    cut = images.crop_and_resize(Image.fromarray(pixels), box, 8)
    np.testing.assert_array_equal(cut, pixels[3:11, 5:13])
    # Scaling up does not mix in what lies outside, either.
    pixels[3:11, 5:13] = 9
    assert (images.crop_and_resize(Image.fromarray(pixels), box, 32) == 9).all()


@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 400), (512, 256), (257, 301)])
def test_center_crop(height, width):
    pixels = np.zeros((height, width, 3), np.uint8)
    scale = 256 / min(height, width)
    middle = (slice(height // 2 - 4, height // 2 + 4), slice(width // 2 - 4, width // 2 + 4))
    pixels[middle] = 255
    cut = images.resize_and_center_crop(Image.fromarray(pixels), 256, 224)
    assert cut.shape == (224, 224, 3)
    bright = np.argwhere(cut[..., 0] > 127)
    np.testing.assert_allclose(bright.mean(axis=0), 111.5, atol=1)
    assert len(bright) == pytest.approx((8 * scale) ** 2, rel=0.3)


def test_center_crop_without_scaling_is_a_slice():
    pixels = numbered(256, 300)
    cut = images.resize_and_center_crop(Image.fromarray(pixels), 256, 224)
    np.testing.assert_array_equal(cut, pixels[16:240, 38:262])


def test_shift_by_hand():
    pixels = numbered(4, 4)
    same = images.random_shift(Draws(integers=[(2, 2)]), pixels, padding=2)
    np.testing.assert_array_equal(same, pixels)
    down = images.random_shift(Draws(integers=[(0, 2)]), pixels, padding=2)
    np.testing.assert_array_equal(down, np.concatenate([np.zeros((2, 4, 3)), pixels[:2]]))
    right = images.random_shift(Draws(integers=[(2, 1)]), pixels, padding=2)
    np.testing.assert_array_equal(right[:, 1:], pixels[:, :3])
    assert not right[:, 0].any()


def test_shift_reaches_every_offset_about_equally():
    rng, pixels = np.random.default_rng(0), np.full((1, 1, 1), 1, np.uint8)
    kept = sum(images.random_shift(rng, pixels, padding=1).item() for _ in range(900))
    assert 60 < kept < 140  # one offset in nine keeps the pixel


def test_flip_mirrors_half_of_the_time():
    pixels = numbered(2, 3)
    mirrored = images.random_flip(Draws(random=[0.1]), pixels)
    np.testing.assert_array_equal(mirrored[0, :, 0], [2, 1, 0])
    np.testing.assert_array_equal(images.random_flip(Draws(random=[0.9]), pixels), pixels)
    rng = np.random.default_rng(0)
    flips = sum(images.random_flip(rng, pixels)[0, 0, 0] == 2 for _ in range(1000))
    assert 440 < flips < 560


def test_lighting_by_hand():
    # One standard deviation along the first component: 0.1 * 0.2175 times its vector.
    shift = images.lighting_shift(Draws(normal=[np.array([0.1, 0.0, 0.0])]), std=0.1)
    np.testing.assert_allclose(shift, 0.02175 * np.array([-0.5675, -0.5808, -0.5836]), rtol=1e-5)


def test_lighting_has_mean_zero_and_the_covariance_of_its_components():
    rng = np.random.default_rng(0)
    shifts = np.array([images.lighting_shift(rng, std=0.1) for _ in range(20_000)])
    np.testing.assert_allclose(shifts.mean(axis=0), 0, atol=5e-4)
    # The components are a rotation, so the variances add up to those along them.
    total = 0.01 * (0.2175**2 + 0.0188**2 + 0.0045**2)
    assert shifts.var(axis=0).sum() == pytest.approx(total, rel=0.05)
    assert shifts.dtype == np.float32


def test_normalize_by_hand():
    pixels = np.array([[[0, 51, 255]]], np.uint8)
    out = images.normalize(pixels, mean=(0.5, 0.0, 0.25), std=(0.5, 0.1, 0.25))
    np.testing.assert_allclose(out, [[[-1.0, 2.0, 3.0]]], rtol=1e-6)
    shifted = images.normalize(
        pixels, (0.5, 0.0, 0.25), (0.5, 0.1, 0.25), np.array([0.5, 0.1, -0.25], np.float32)
    )
    np.testing.assert_allclose(shifted, [[[0.0, 3.0, 2.0]]], rtol=1e-6, atol=1e-6)
    assert out.dtype == shifted.dtype == np.float32


def test_decode_makes_rgb_of_every_mode():
    gray = Image.new("L", (3, 2), 7)
    for image, pixel in [(gray, (7, 7, 7)), (gray.convert("RGBA"), (7, 7, 7))]:
        file = io.BytesIO()
        image.save(file, "PNG")
        assert images.decode_image(file.getvalue()).getpixel((0, 0)) == pixel
    file = io.BytesIO()
    Image.new("CMYK", (3, 2)).save(file, "JPEG")
    assert images.decode_image(file.getvalue()).mode == "RGB"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_broken_images_are_value_errors(image_format):
    whole = encode(numbered(64, 64), image_format)
    for broken in (b"", b"not an image", whole[: len(whole) // 2], whole[:30] + whole[60:]):
        with pytest.raises(ValueError, match=f"{len(broken)} bytes that are not a readable image"):
            images.decode_image(broken)


def test_a_data_uri_holds_the_image():
    pixels = np.full((6, 9, 3), (200, 50, 100), np.uint8)
    head, encoded = images.image_uri(pixels).split(",")
    assert head == "data:image/jpeg;base64"
    back = np.asarray(images.decode_image(base64.b64decode(encoded))).astype(int)
    assert back.shape == pixels.shape
    assert np.abs(back - pixels).max() <= 3
