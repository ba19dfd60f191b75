"""Matches anchors and proposals with objects, and draws those that losses count.

Source: Ren et al., "Faster R-CNN", NeurIPS 2015, section 3.1.2; the rules are torchvision's.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.models.detection.boxes import iou


class Match(NamedTuple):
    """What candidates are matched with.

    Attributes:
      object: (n,) index of the object with the largest overlap.
      is_object: (n,) whether the candidate shows it.
      is_background: (n,) whether it shows no object. What is neither does not count.
    """

    object: jax.Array
    is_object: jax.Array
    is_background: jax.Array


def match(
    candidates: jax.Array,
    objects: jax.Array,
    is_there: jax.Array,
    *,
    above: float,
    below: float,
    keep_best: bool = False,
) -> Match:
    """Matches boxes with objects by their intersection over union.

    Args:
      candidates: (n, 4).
      objects: (m, 4), padded.
      is_there: (m,) False for padding. An image may have no object: all is background then.
      above: a candidate shows its object from this overlap on.
      below: it is background below this one.
      keep_best: an object's best candidates show it, however small the overlap, or objects
        between two anchors would never be learned.
    """
    # Padding overlaps with nothing, less than boxes that do not touch.
    overlap = jnp.where(is_there, iou(candidates, objects), -1.0)
    most = overlap.max(axis=1)
    found, is_object = overlap.argmax(axis=1), most >= above
    if keep_best:
        # `best` holds some of the very numbers in `overlap`, so `==` is exact below. Ties all
        # count, as in torchvision.
        best = overlap.max(axis=0)
        # Without `best > 0`, padding would make every candidate an object.
        is_object |= jnp.any((overlap == best) & (best > 0), axis=1)
    return Match(found, is_object, ~is_object & (most < below))


def sample(
    key: jax.Array, found: Match, *, count: int, share: float
) -> tuple[jax.Array, jax.Array]:
    """Draws what losses count: at most `share * count` objects, filled up with background.

    Args:
      key: random.
      found: (n,) each.
      count: how many are drawn, where there are as many.
      share: of objects at most.

    Returns:
      (n,) booleans each: drawn objects, drawn background.
    """
    # Background fills up whatever room the objects leave: few objects make no smaller sample.
    objects = _draw(key, found.is_object, int(share * count))
    left = count - objects.sum()
    return objects, _draw(jax.random.fold_in(key, 1), found.is_background, left)


def _draw(key: jax.Array, among: jax.Array, count: jax.Array | int) -> jax.Array:
    """Marks `count` of those marked, or all if there are fewer."""
    # A static shape: everything draws a lot, and what is not among them draws the worst.
    lots = jnp.where(among, jax.random.uniform(key, among.shape), 2.0)
    # The order of the order is the rank of each.
    rank = jnp.argsort(jnp.argsort(lots))
    return among & (rank < count)
