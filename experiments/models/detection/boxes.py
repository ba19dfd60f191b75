"""Boxes: overlap, coding against anchors, non-maximum suppression, anchors of a pyramid.

A box is (left, top, right, bottom) in pixels; pixel i covers [i, i + 1]. All shapes are static.

Source: Ren et al., "Faster R-CNN", NeurIPS 2015; the order and limits are those of torchvision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# A coded size may enlarge an anchor to 1000 / 16 times its side at most, or exp would overflow.
_LARGEST_LOG_SCALE = math.log(1000 / 16)


def area(boxes: jax.Array) -> jax.Array:
    """Areas (...) of boxes (..., 4); 0 where right < left or bottom < top."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def iou(first: jax.Array, second: jax.Array) -> jax.Array:
    """Intersection over union of every pair.

    Args:
      first: (..., n, 4).
      second: (..., m, 4).

    Returns:
      (..., n, m); 0 for two boxes without area.
    """
    a, b = first[..., :, None, :], second[..., None, :, :]
    shared = jnp.concatenate(
        [jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], axis=-1
    )
    intersection = area(shared)
    union = area(a) + area(b) - intersection
    # `where` computes both of its branches, so the divisor must not be 0 either.
    return jnp.where(union > 0, intersection / jnp.where(union > 0, union, 1), 0)


def encode(boxes: jax.Array, anchors: jax.Array, weights: Sequence[float]) -> jax.Array:
    """Codes boxes against anchors: center offsets in anchor sides, and logs of relative sides.

    Args:
      boxes: (..., 4), with positive sides.
      anchors: (..., 4), with positive sides.
      weights: factors of the four numbers.

    Returns:
      (..., 4): x, y, width, height.
    """
    center, side = _center_and_side(boxes)
    anchor_center, anchor_side = _center_and_side(anchors)
    offsets = (center - anchor_center) / anchor_side
    scales = jnp.log(side / anchor_side)
    return jnp.concatenate([offsets, scales], axis=-1) * jnp.asarray(weights, boxes.dtype)


def decode(codes: jax.Array, anchors: jax.Array, weights: Sequence[float]) -> jax.Array:
    """The inverse of `encode`; sides grow at most 62.5-fold.

    Args:
      codes: (..., 4).
      anchors: (..., 4).
      weights: as in `encode`.
    """
    codes = codes / jnp.asarray(weights, codes.dtype)
    anchor_center, anchor_side = _center_and_side(anchors)
    center = codes[..., :2] * anchor_side + anchor_center
    side = jnp.exp(jnp.minimum(codes[..., 2:], _LARGEST_LOG_SCALE)) * anchor_side
    return jnp.concatenate([center - side / 2, center + side / 2], axis=-1)


def clip(boxes: jax.Array, height: int, width: int) -> jax.Array:
    """Cuts boxes (..., 4) off at the image's border."""
    limits = jnp.array([width, height, width, height], boxes.dtype)
    return jnp.clip(boxes, 0, limits)


def suppress(
    boxes: jax.Array, scores: jax.Array, threshold: float, groups: jax.Array | None = None
) -> jax.Array:
    """Non-maximum suppression: which boxes stay.

    From the highest score down, a box stays unless one that stays overlaps it by more than the
    threshold. Ties: the lower index comes first. A score of -inf marks padding, which neither
    stays nor suppresses.

    Greedy suppression is the only fixed point of "a box stays unless a better one that stays
    overlaps it": the best is decided after one round, the next after two at most. The rounds
    needed are the longest chain of suppressions, a few, where a loop over boxes takes hundreds.

    Args:
      boxes: (n, 4).
      scores: (n,).
      threshold: of the intersection over union.
      groups: (n,), such as classes; only boxes of the same group suppress each other.

    Returns:
      (n,) booleans, in the order given.
    """
    index = jnp.arange(len(scores))
    is_better = (scores[:, None] > scores) | (
        (scores[:, None] == scores) & (index[:, None] < index)
    )
    # rivals[i, j]: box i suppresses box j, if i itself stays.
    rivals = is_better & (iou(boxes, boxes) > threshold)
    if groups is not None:
        rivals &= groups[:, None] == groups
    present = scores > -jnp.inf

    def is_unsettled(stays: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(stays[0] != stays[1])

    def settle(stays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, now = stays
        return now, present & ~jnp.any(rivals & now[:, None], axis=0)

    # The first of the pair only has to differ from the second, so that the loop begins. With no box
    # present, they are equal and nothing is left to settle.
    _, stays = jax.lax.while_loop(is_unsettled, settle, (jnp.zeros_like(present), present))
    return stays


def pyramid_anchors(
    shapes: Sequence[tuple[int, int]],
    image: tuple[int, int],
    sizes: Sequence[float],
    ratios: Sequence[float],
) -> list[np.ndarray]:
    """Anchors at every pixel of every level: one size a level, several ratios.

    An anchor has the area size^2 and height / width = ratio, and is centered on its pixel's upper
    left corner, as in torchvision.

    Args:
      shapes: (rows, columns) of the levels.
      image: (height, width), which the levels divide.
      sizes: one per level, in pixels.
      ratios: heights over widths.

    Returns:
      Of each level (rows * columns * ratios, 4), rows outermost, float32.
    """
    levels = []
    for (rows, columns), size in zip(shapes, sizes, strict=True):
        roots = np.sqrt(np.asarray(ratios, float))
        half = np.stack([size / roots, size * roots], axis=-1) / 2
        y = np.arange(rows) * (image[0] // rows)
        x = np.arange(columns) * (image[1] // columns)
        corners = np.stack(np.meshgrid(x, y), axis=-1)[:, :, None]
        boxes = np.concatenate([corners - half, corners + half], axis=-1)
        # Ratios vary fastest, as the channels of the region head do. Sides are not rounded to whole
        # pixels, unlike torchvision's.
        levels.append(boxes.reshape(-1, 4).astype(np.float32))
    return levels


def _center_and_side(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Centers (..., 2) and sides (..., 2)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
