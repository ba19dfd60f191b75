"""Generated flow: exact, deterministic, and cut out of separate parts of the photographs."""

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from experiments.data import synthetic_flow as module
from experiments.data.synthetic_flow import (
    Layer,
    draw_layers,
    draw_pair,
    grained,
    move,
    photographs,
    render,
)


def background(motion, texture):
    height, width, _ = texture.shape
    origin = np.array([(width - 1) / 2, (height - 1) / 2])
    return Layer(
        texture, origin, np.eye(2), np.asarray(motion, float), np.zeros(2), np.zeros((0, 2))
    )


def noise(seed=0, side=21):
    return np.random.default_rng(seed).random((side, side, 3))


def disc(motion, texture, radius, center=(0, 0)):
    layer = background(motion, texture)
    return layer._replace(center=np.array(center, float), radii=np.array([[radius, 0.0]]))


def test_a_shift_by_whole_pixels_moves_the_image():
    texture = noise()
    pair = render([background([[1, 0, 2], [0, 1, -3]], texture)], 21)
    np.testing.assert_allclose(pair.first, texture, atol=1e-6)
    assert (pair.flow == np.array([2, -3])).all()
    np.testing.assert_allclose(pair.second[:-3, 2:], pair.first[3:, :-2], atol=1e-6)


def test_flow_points_at_the_same_point_of_the_layer():
    angle = 0.2
    turn = [[np.cos(angle), -np.sin(angle), 1.5], [np.sin(angle), np.cos(angle), -0.5]]
    # Linear in the position, so that interpolation is exact.
    y, x = np.mgrid[:41, :41] / 40
    texture = np.stack([x, y, x + y], axis=-1) / 2
    pair = render([background(turn, texture)], 41)
    y, x = np.mgrid[:41, :41]
    at = [y + pair.flow[..., 1], x + pair.flow[..., 0]]
    arrives = np.stack(
        [map_coordinates(pair.second[..., c].astype(float), at, order=1) for c in range(3)], axis=-1
    )
    inside = (slice(12, -12), slice(12, -12))
    np.testing.assert_allclose(arrives[inside], pair.first[inside], atol=1e-5)


def test_the_front_layer_hides_the_back_one_in_both_images():
    still, moving = noise(1), noise(2)
    front = disc([[1, 0, 4], [0, 1, 0]], moving, radius=5)
    pair = render([background([[1, 0, 0], [0, 1, 0]], still), front], 21)
    y, x = np.mgrid[:21, :21] - 10
    first, second = np.hypot(x, y) <= 5, np.hypot(x - 4, y) <= 5
    assert (pair.flow[first] == (4, 0)).all()
    assert (pair.flow[~first] == 0).all()
    np.testing.assert_allclose(pair.first[first], moving[first], atol=1e-6)
    np.testing.assert_allclose(pair.first[~first], still[~first], atol=1e-6)
    np.testing.assert_allclose(pair.second[~second], still[~second], atol=1e-6)
    np.testing.assert_allclose(pair.second[10, 14], moving[10, 10], atol=1e-6)


def test_visible_points_keep_their_color():
    for seed in range(5):
        layers = draw_layers(np.random.default_rng(seed), 48, "train")
        pair = render(layers, 48)
        y, x = np.mgrid[:48, :48]
        at = [y + pair.flow[..., 1], x + pair.flow[..., 0]]
        arrives = np.stack(
            [
                map_coordinates(pair.second[..., c].astype(float), at, order=1, cval=np.nan)
                for c in range(3)
            ],
            axis=-1,
        )
        errors = np.abs(arrives - pair.first).max(axis=-1)
        errors = errors[~np.isnan(errors)]
        # All but outlines and what is hidden in the second image; bilinear blur is small.
        assert np.median(errors) < 0.06
        still = np.abs(pair.second - pair.first).max(axis=-1)
        assert np.median(errors) < 0.5 * np.median(still)


def test_the_same_generator_gives_the_same_pair():
    one, two = (draw_pair(np.random.default_rng((3, 4)), 32, "train") for _ in range(2))
    other = draw_pair(np.random.default_rng((3, 5)), 32, "train")
    for a, b, c in zip(one, two, other, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_blobs_move_otherwise_than_the_background():
    layers = draw_layers(np.random.default_rng(0), 64, "test")
    assert 2 <= len(layers) <= 3
    assert len(layers[0].radii) == 0
    assert all(len(layer.radii) == 4 for layer in layers[1:])
    centers = [layer.center for layer in layers]
    shifts = [move(layer.motion, c) - c for layer, c in zip(layers, centers, strict=True)]
    assert len({tuple(shift) for shift in shifts}) == len(layers)


def test_grain_is_added_once_and_stays_the_same(monkeypatch):
    grained.cache_clear()
    monkeypatch.setattr(module, "photographs", lambda split: (np.full((40, 60, 3), 0.5),))
    (once,) = grained("train")
    grained.cache_clear()
    (again,) = grained("train")
    grained.cache_clear()
    np.testing.assert_array_equal(once, again)
    # A little less where it was cut off at 0 and 1.
    assert once.std() == pytest.approx(0.2, rel=0.1)
    # A color of its own at every point.
    assert np.ptp(once, axis=-1).mean() > 0.2


def test_splits_are_other_parts_of_the_photographs():
    for train, test in zip(photographs("train"), photographs("test"), strict=True):
        assert train.shape[0] == test.shape[0] == 213
        assert train.shape[1] + test.shape[1] == 320
        assert train.shape[1] == pytest.approx(0.65 * 320, abs=1)
        assert 0 <= train.min() < train.max() <= 1
