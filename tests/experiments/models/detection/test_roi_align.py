"""RoIAlign and the choice of level against loops over samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.models.detection import roi_align as module
from experiments.models.detection.roi_align import level_of, roi_align


@pytest.fixture(scope="module", params=[0, 10**6], ids=["by samples", "by products"])
def align_jit(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEW_PIXELS", request.param)
        # A new function, or programs that the other way was traced into would be found.
        yield jax.jit(lambda *args: roi_align(*args), static_argnums=(1, 4))


def sample(image, x, y):
    """One bilinear sample at pixel centers' coordinates; near ones are clamped, far ones zero."""
    rows, columns = image.shape[:2]
    if not (-1 <= y <= rows and -1 <= x <= columns):
        return np.zeros(image.shape[2])
    x, y = min(max(x, 0), columns - 1), min(max(y, 0), rows - 1)
    top, left = int(y), int(x)
    below, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    dy, dx = y - top, x - left
    upper = (1 - dx) * image[top, left] + dx * image[top, right]
    lower = (1 - dx) * image[below, left] + dx * image[below, right]
    return (1 - dy) * upper + dy * lower


def align(image, stride, box, size):
    left, top, right, bottom = np.array(box) / stride - 0.5
    out = np.zeros((size, size, image.shape[2]))
    for i, j, a, b in np.ndindex(size, size, 2, 2):
        y = top + (i + (a + 0.5) / 2) * (bottom - top) / size
        x = left + (j + (b + 0.5) / 2) * (right - left) / size
        out[i, j] += sample(image, x, y) / 4
    return out


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 3), seed=st.integers(0, 999))
def test_every_box_is_read_from_its_own_level(align_jit, size, seed):
    rng = np.random.default_rng(seed)
    levels = [rng.standard_normal(s).astype("f4") for s in ((8, 12, 2), (4, 6, 2), (2, 3, 2))]
    strides = (2, 4, 8)
    corner = rng.uniform(-6, 20, (5, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 12, (5, 2))], 1).astype("f4")
    which = rng.integers(0, 3, 5)
    found = align_jit(levels, strides, boxes, which, size)
    for got, box, level in zip(found, boxes, which, strict=True):
        expected = align(levels[level], strides[level], box, size)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_a_box_over_whole_pixels_gives_them_back(align_jit):
    image = np.arange(36, dtype=np.float32).reshape(6, 6, 1)
    box = np.array([[1, 2, 5, 6]], np.float32)
    # Linear in the position, so the mean of a cell is the value at its center.
    found = align_jit([image], (1,), box, np.zeros(1, int), 4)
    inside = np.asarray(found)[0, :3, :, 0]
    np.testing.assert_allclose(inside, image[2:5, 1:5, 0], atol=1e-5)


def test_gradients_reach_the_map_and_not_the_boxes(align_jit):
    rng = np.random.default_rng(0)
    image = jnp.array(rng.standard_normal((5, 5, 1)), jnp.float32)
    box = jnp.array([[0.7, 1.1, 3.9, 4.2]])

    def total(image, box):
        return align_jit([image], (1,), box, jnp.zeros(1, int), 2).sum()

    by_image, by_box = jax.jit(jax.grad(total, argnums=(0, 1)))(image, box)
    assert (by_box == 0).all()
    # The sum of all weights: four cells, each a mean.
    assert float(by_image.sum()) == pytest.approx(4, rel=1e-5)


def test_levels_of_boxes():
    sides = np.array([1, 56, 111, 112, 223, 224, 447, 448, 896, 5000], np.float32)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    # Level 0 is P2: a box of 224 pixels is read from P4.
    assert level_of(boxes, 4).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert level_of(np.zeros((1, 4), np.float32), 4).tolist() == [0]
