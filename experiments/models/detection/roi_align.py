"""RoIAlign: what a feature pyramid holds inside of boxes, on a grid of fixed size.

Source: He et al., "Mask R-CNN", ICCV 2017; the level of a box is equation 1 of Lin et al.,
"Feature Pyramid Networks", CVPR 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from experiments.models.detection.boxes import area

# Samples a side of each cell of the grid, as in torchvision.
SAMPLES = 2
# Maps of so few pixels in all are read by matrix products, since the gradient of reading single
# pixels is slow on CPUs. With many pixels the products would be larger than all other work.
_FEW_PIXELS = 1024


def roi_align(
    levels: Sequence[jax.Array],
    strides: Sequence[int],
    boxes: jax.Array,
    which: jax.Array,
    size: int,
) -> jax.Array:
    """Averages bilinear samples of a feature map in the cells of a grid over each box.

    A cell's value is the mean of 2x2 samples; pixel i of a map has its center at i + 1/2. Samples
    more than a pixel outside of the map are zero, nearer ones are those of its border. Boxes are
    given no gradient.

    Args:
      levels: maps (rows, columns, features) of one image, or of one mask.
      strides: pixels of the image per pixel of the map, one for each level.
      boxes: (n, 4) in pixels of the image.
      which: (n,) the level that each box is read from.
      size: of the grid.

    Returns:
      (n, size, size, features).
    """
    boxes = jax.lax.stop_gradient(boxes)
    pixels = sum(level.shape[0] * level.shape[1] for level in levels)
    read = _by_products if pixels <= _FEW_PIXELS else _by_samples
    return read(levels, strides, boxes, which, size)


def level_of(
    boxes: jax.Array, levels: int, *, canonical_side: float = 224, canonical_level: int = 2
) -> jax.Array:
    """The level that a box is read from: floor(k0 + log2(sqrt(area) / side)).

    Args:
      boxes: (..., 4).
      levels: how many there are; those beyond are cut off.
      canonical_side: of a box that is read from level k0.
      canonical_level: k0, counted from the finest, 0.

    Returns:
      (...) int32.
    """
    # The small number keeps powers of two in place, as in torchvision.
    # The default 2 is k0 = 4 of the paper, which calls the finest level 2.
    level = canonical_level + jnp.log2(jnp.sqrt(area(boxes)) / canonical_side) + 1e-6
    return jnp.clip(jnp.floor(level), 0, levels - 1).astype(jnp.int32)


def _by_products(
    levels: Sequence[jax.Array],
    strides: Sequence[int],
    boxes: jax.Array,
    which: jax.Array,
    size: int,
) -> jax.Array:
    """`roi_align` as products of every map with what each of its rows and columns weighs."""
    features = levels[0].shape[-1]
    values = jnp.zeros((len(boxes), size, size, features), levels[0].dtype)
    for index, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        # From edges to pixel centers: position 0 is now the center of the first pixel.
        scaled = boxes / stride - 0.5
        rows = _weights(scaled[:, 1], scaled[:, 3], level.shape[0], size)
        columns = _weights(scaled[:, 0], scaled[:, 2], level.shape[1], size)
        # Boxes of other levels weigh nothing here, so each box gets one level from the sum over
        # all.
        own = jnp.where((which == index)[:, None, None], rows, 0)
        across = jnp.einsum("nir,rcf->nicf", own, level)
        values += jnp.einsum("nicf,njc->nijf", across, columns)
    return values


def _weights(begin: jax.Array, end: jax.Array, length: int, size: int) -> jax.Array:
    """Along one axis: how much of each pixel is in each cell, (n, size, length)."""
    at, is_near = _positions(begin, end, length, size)
    weights = jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(length)), 0)
    weights = jnp.where(is_near[..., None], weights, 0)
    return weights.reshape(len(at), size, SAMPLES, length).mean(axis=2)


def _by_samples(
    levels: Sequence[jax.Array],
    strides: Sequence[int],
    boxes: jax.Array,
    which: jax.Array,
    size: int,
) -> jax.Array:
    """`roi_align` by reading the four neighbors of every sample.

    The levels are joined to one long list of pixels, so that each box reads from its own level
    only, whatever that is.
    """
    pixels = jnp.concatenate([level.reshape(-1, level.shape[-1]) for level in levels])
    counts = [level.shape[0] * level.shape[1] for level in levels]
    starts = jnp.array([sum(counts[:index]) for index in range(len(counts))])[which]
    rows = jnp.array([level.shape[0] for level in levels])[which]
    columns = jnp.array([level.shape[1] for level in levels])[which]
    scale = 1 / jnp.array(strides, boxes.dtype)[which]
    boxes = boxes * scale[:, None] - 0.5
    top, below, y_weights = _neighbors(boxes[:, 1], boxes[:, 3], rows, size)
    left, right, x_weights = _neighbors(boxes[:, 0], boxes[:, 2], columns, size)
    count = size * SAMPLES
    values = jnp.zeros((len(boxes), count, count, pixels.shape[-1]), pixels.dtype)
    for row, row_weight in zip((top, below), y_weights, strict=True):
        for column, column_weight in zip((left, right), x_weights, strict=True):
            at = starts[:, None, None] + row[:, :, None] * columns[:, None, None]
            weight = row_weight[:, :, None] * column_weight[:, None, :]
            values += weight[..., None] * pixels[at + column[:, None, :]]
    features = pixels.shape[-1]
    cells = values.reshape(len(boxes), size, SAMPLES, size, SAMPLES, features)
    return cells.mean(axis=(2, 4))


def _neighbors(
    begin: jax.Array, end: jax.Array, length: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Along one axis: the pixels below and above each sample, and their weights, (n, samples)."""
    limit = length[:, None]
    at, is_near = _positions(begin, end, limit, size)
    low = jnp.floor(at).astype(jnp.int32)
    # At the last pixel the share is 0, so that it does not matter which pixel is read as its next.
    high = jnp.minimum(low + 1, limit - 1)
    share = at - low
    zero = jnp.zeros_like(share)
    return low, high, (jnp.where(is_near, 1 - share, zero), jnp.where(is_near, share, zero))


def _positions(
    begin: jax.Array, end: jax.Array, length: jax.Array | int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Along one axis: where each sample is read, and whether it counts, (n, samples)."""
    count = size * SAMPLES
    at = begin[:, None] + (jnp.arange(count) + 0.5) / count * (end - begin)[:, None]
    return jnp.clip(at, 0, length - 1), (at >= -1) & (at <= length)
