"""Augmented pairs: the flow still leads from a point to the same point."""

import numpy as np
import pytest

from experiments.data.flow_augment import augment, mirror, resize, turn_over


def landmark(shape=(20, 30)):
    """A dark pair with one bright pixel that moves by (4, 2)."""
    first, second = np.zeros((2, *shape, 3), np.uint8)
    first[6, 10] = second[8, 14] = 255
    flow = np.zeros((*shape, 2), np.float32)
    flow[6, 10] = (4, 2)
    return first, second, flow


def brightest(image):
    return np.unravel_index(image[..., 0].argmax(), image.shape[:2])


@pytest.mark.parametrize("change", [mirror, turn_over, lambda pair: mirror(turn_over(pair))])
def test_mirrored_flow_leads_to_the_landmark(change):
    first, second, flow = change(landmark())
    row, column = brightest(first)
    x, y = flow[row, column]
    assert (row + y, column + x) == brightest(second)


def test_flow_grows_with_the_image():
    flow = np.broadcast_to(np.array([2, -3], np.float32), (10, 20, 2))
    images = np.random.default_rng(0).integers(0, 256, (2, 10, 20, 3), np.uint8)
    first, second, scaled = resize((*images, flow), 15, 50)
    assert first.shape == second.shape == (15, 50, 3)
    np.testing.assert_allclose(scaled, np.broadcast_to((5, -4.5), (15, 50, 2)), rtol=1e-5)


def test_draws_have_the_size_asked_for_and_depend_on_the_generator():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 24, 32, 3), np.uint8)
    pair = (*images, rng.standard_normal((24, 32, 2)).astype(np.float32))
    draws = [augment(np.random.default_rng(seed), pair, 20, 32) for seed in range(20)]
    again = augment(np.random.default_rng(3), pair, 20, 32)
    for first, second, flow in draws:
        assert first.shape == second.shape == (20, 32, 3)
        assert flow.shape == (20, 32, 2)
        assert flow.dtype == np.float32
    for one, two in zip(draws[3], again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert len({first.tobytes() for first, _, _ in draws}) > 15


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="cannot cut 21 x 30 pixels out of 20 x 30"):
        augment(np.random.default_rng(0), landmark(), 21, 30)
