"""From a detector's raw numbers to boxes: proposals of regions, and detections.

All of it is for one image (`jax.vmap` for more), with static shapes: what is missing is marked.

Source: Ren et al., "Faster R-CNN", NeurIPS 2015; the order of the steps is torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.models.detection.boxes import clip, decode, suppress

# The 10 and 5 are one over 0.1 and 0.2, by which the released code of Faster R-CNN scales what the
# box head learns.
REGION_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
# Boxes with a shorter side are dropped.
_SHORTEST_SIDE = 1e-2


class Detections(NamedTuple):
    """The boxes found in one image, best first.

    Attributes:
      boxes: (n, 4).
      classes: (n,) int32, from 1; 0 where there is no detection.
      scores: (n,) in [0, 1]; 0 where there is no detection.
    """

    boxes: jax.Array
    classes: jax.Array
    scores: jax.Array


def propose(
    scores: Sequence[jax.Array],
    codes: Sequence[jax.Array],
    anchors: Sequence[jax.Array],
    image: tuple[int, int],
    *,
    before: int,
    after: int,
    threshold: float = 0.7,
) -> tuple[jax.Array, jax.Array]:
    """Chooses the regions most likely to show an object.

    In each level the best `before` are decoded, cut off at the border and thinned out by
    suppression; of what is left of all levels the best `after` are taken. No gradient goes through.

    Args:
      scores: of each level (anchors,).
      codes: of each level (anchors, 4), see `encode`.
      anchors: of each level (anchors, 4).
      image: (height, width).
      before: at most how many of a level.
      after: at most how many in all.
      threshold: of the suppression.

    Returns:
      Boxes (m, 4), m the smaller of `after` and what all levels have, and whether each is there.
    """
    found_boxes, found_scores = [], []
    for level_scores, level_codes, level_anchors in zip(scores, codes, anchors, strict=True):
        best, at = jax.lax.top_k(
            jax.lax.stop_gradient(level_scores), min(before, len(level_scores))
        )
        coded = jax.lax.stop_gradient(level_codes)[at]
        boxes = clip(decode(coded, jnp.asarray(level_anchors)[at], REGION_WEIGHTS), *image)
        # Shapes are static, so what is thrown out stays in place with a score of -inf.
        best = jnp.where(_is_long(boxes), best, -jnp.inf)
        stays = suppress(boxes, best, threshold)
        found_boxes.append(boxes)
        found_scores.append(jnp.where(stays, best, -jnp.inf))
    together = jnp.concatenate(found_scores)
    best, at = jax.lax.top_k(together, min(after, len(together)))
    return jnp.concatenate(found_boxes)[at], best > -jnp.inf


def detect(
    logits: jax.Array,
    codes: jax.Array,
    proposals: jax.Array,
    is_there: jax.Array,
    image: tuple[int, int],
    *,
    candidates: int,
    count: int,
    lowest: float = 0.05,
    threshold: float = 0.5,
) -> Detections:
    """Chooses the boxes and classes to report.

    Every pair of a proposal and a class but the background is a candidate. The best are decoded,
    cut off at the border and thinned out by suppression within their class.

    Args:
      logits: (n, classes), class 0 is the background.
      codes: (n, classes, 4).
      proposals: (n, 4).
      is_there: (n,) False for padding.
      image: (height, width).
      candidates: the largest number of pairs to examine.
      count: how many detections, at most.
      lowest: score that is reported.
      threshold: of the suppression.
    """
    # Class 0 is the background, which is not reported; hence the + 1 below.
    scores = jnp.where(is_there[:, None], jax.nn.softmax(logits)[:, 1:], 0)
    classes = scores.shape[1]
    # torchvision suppresses among all pairs. Here the overlaps are a square matrix, which the limit
    # keeps small.
    best, at = jax.lax.top_k(scores.reshape(-1), min(candidates, scores.size))
    of, label = at // classes, at % classes + 1
    boxes = clip(decode(codes[of, label], proposals[of], BOX_WEIGHTS), *image)
    ranked = jnp.where((best > lowest) & _is_long(boxes), best, -jnp.inf)
    # The limit `lowest` comes before the suppression, so boxes with low scores suppress nothing.
    stays = suppress(boxes, ranked, threshold, label)
    ranked = jnp.where(stays, ranked, -jnp.inf)
    top, at = jax.lax.top_k(ranked, min(count, len(ranked)))
    there = top > -jnp.inf
    return Detections(
        boxes=boxes[at],
        classes=jnp.where(there, label[at], 0).astype(jnp.int32),
        scores=jnp.where(there, top, 0),
    )


def _is_long(boxes: jax.Array) -> jax.Array:
    return jnp.min(boxes[..., 2:] - boxes[..., :2], axis=-1) >= _SHORTEST_SIDE
