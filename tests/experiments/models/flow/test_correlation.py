"""All-pairs correlation and its lookup against loops over pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.models.flow.correlation import center_and_scale, correlation_pyramid, look_up

pyramid_jit = jax.jit(correlation_pyramid, static_argnums=2)
look_up_jit = jax.jit(look_up, static_argnums=2)


def bilinear(image, x, y):
    """The value of an image (rows, columns) at a point, zero outside."""
    total = 0.0
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                total += image[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def maps(rng, rows, columns, features=3, batch=1):
    return rng.standard_normal((2, batch, rows, columns, features)).astype(np.float32)


def test_every_pixel_is_correlated_with_every_other():
    first, second = maps(np.random.default_rng(0), 3, 4, batch=2)
    (level,) = correlation_pyramid(first, second, levels=1)
    expected = np.zeros((2, 3, 4, 3, 4))
    for at in np.ndindex(2, 3, 4, 3, 4):
        b, i, j, k, m = at
        expected[at] = first[b, i, j] @ second[b, k, m] / np.sqrt(3)
    np.testing.assert_allclose(level, expected, rtol=1e-5, atol=1e-6)


def test_levels_are_means_and_odd_rows_are_left_out():
    first, second = maps(np.random.default_rng(1), 5, 4)
    fine, coarse = correlation_pyramid(first, second, levels=2)
    assert coarse.shape == (1, 5, 4, 2, 2)
    expected = np.asarray(fine)[..., :4, :].reshape(1, 5, 4, 2, 2, 2, 2).mean(axis=(4, 6))
    np.testing.assert_allclose(coarse, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    sides=st.sampled_from([(4, 6), (5, 4)]),
    radius=st.integers(1, 2),
    reach=st.floats(0, 8),
    seed=st.integers(0, 99),
)
def test_lookup_samples_windows_of_every_level(sides, radius, reach, seed):
    rows, columns = sides
    rng = np.random.default_rng(seed)
    pyramid = pyramid_jit(*maps(rng, rows, columns), 2)
    points = rng.uniform(-reach, reach, (1, rows, columns, 2)).astype(np.float32)
    found = np.asarray(look_up_jit(pyramid, points, radius))
    window = 2 * radius + 1
    assert found.shape == (1, rows, columns, 2 * window**2)
    found = found.reshape(rows, columns, 2, window, window)
    levels = [np.asarray(level)[0] for level in pyramid]
    for i, j, level, dy, dx in np.ndindex(found.shape):
        x, y = points[0, i, j] / 2**level + (dx - radius, dy - radius)
        expected = bilinear(levels[level][i, j], x, y)
        assert found[i, j, level, dy, dx] == pytest.approx(expected, abs=1e-4)


def test_a_whole_pixel_shift_is_found_where_it_is():
    # Features that name their pixel: the correlation is largest at the pixel itself.
    rng = np.random.default_rng(2)
    first = rng.standard_normal((1, 8, 8, 64)).astype(np.float32)
    second = np.roll(first, (1, 2), axis=(1, 2))
    (level,) = correlation_pyramid(first, second, levels=1)
    y, x = np.mgrid[:8, :8]
    points = np.stack([x, y], axis=-1)[None].astype(np.float32)
    window = np.asarray(look_up([level], points, radius=2)).reshape(8, 8, 5, 5)
    inside = window[:6, :6].reshape(36, 25).argmax(axis=1)
    assert set(inside) == {(1 + 2) * 5 + (2 + 2)}


def test_centered_features_correlate_most_with_themselves():
    rng = np.random.default_rng(5)
    # A part that all pixels share would hide the rest.
    first = 10 + rng.standard_normal((2, 4, 5, 16)).astype(np.float32)
    unit = np.asarray(jax.jit(center_and_scale)(first))
    assert np.square(unit).sum(axis=-1) == pytest.approx(16, rel=1e-3)
    (level,) = pyramid_jit(unit, unit, 1)
    best = np.asarray(level).reshape(2, 20, 20).argmax(axis=2)
    np.testing.assert_array_equal(best, np.broadcast_to(np.arange(20), (2, 20)))


def test_gradients_flow_into_the_maps():
    first, second = maps(np.random.default_rng(3), 4, 4)
    points = np.full((1, 4, 4, 2), 1.3, np.float32)

    def total(first):
        return look_up(correlation_pyramid(first, second, 2), points, 1).sum()

    total = jax.jit(total)
    grads = jax.jit(jax.grad(total))(jnp.asarray(first))
    step = np.zeros_like(first)
    step[0, 1, 2, 0] = 1e-2
    slope = (total(first + step) - total(first - step)) / 2e-2
    assert grads[0, 1, 2, 0] == pytest.approx(float(slope), rel=1e-2)


def test_maps_that_are_too_small_or_differ_are_errors():
    first, second = maps(np.random.default_rng(4), 3, 4)
    with pytest.raises(ValueError, match="at least 4 pixels"):
        correlation_pyramid(first, second, levels=3)
    with pytest.raises(ValueError, match="differ in shape"):
        correlation_pyramid(first, second[:, :2], levels=1)
