"""What a detector learns from: samples of anchors and proposals, and their losses.

All of it is for one image; `jax.vmap` for more. Losses are means over the samples of the image.

Source: Ren et al., "Faster R-CNN", NeurIPS 2015; He et al., "Mask R-CNN", ICCV 2017; thresholds,
shares and the smooth L1 loss are torchvision's.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.models.detection.boxes import encode
from experiments.models.detection.matching import match, sample
from experiments.models.detection.proposals import BOX_WEIGHTS, REGION_WEIGHTS
from experiments.models.detection.roi_align import roi_align

_BETA = 1 / 9  # where the box loss turns from quadratic to linear


class Chosen(NamedTuple):
    """Proposals of one image that are learned from, objects first.

    Attributes:
      boxes: (n, 4).
      object: (n,) index of the true object.
      classes: (n,) 0 for background.
      weights: (n,) 1, or 0 where there were not enough proposals.
    """

    boxes: jax.Array
    object: jax.Array
    classes: jax.Array
    weights: jax.Array


def region_losses(
    key: jax.Array,
    logits: jax.Array,
    codes: jax.Array,
    anchors: jax.Array,
    boxes: jax.Array,
    classes: jax.Array,
    *,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of the sampled anchors, and smooth L1 of the objects' codes among them.

    Args:
      key: draws the samples.
      logits: (n,) whether an anchor shows an object.
      codes: (n, 4).
      anchors: (n, 4).
      boxes: (objects, 4).
      classes: (objects,) 0 for padding.
      count: samples.

    Returns:
      Both sums over the number of samples.
    """
    # Anchors between the two thresholds count neither as objects nor as background. A small object
    # may reach 0.7 with no anchor at all, hence `keep_best`.
    found = match(anchors, boxes, classes > 0, above=0.7, below=0.3, keep_best=True)
    objects, background = sample(key, found, count=count, share=0.5)
    total = jnp.maximum((objects | background).sum(), 1)
    entropy = optax.sigmoid_binary_cross_entropy(logits, objects.astype(logits.dtype))
    truth = _coded(boxes[found.object], anchors, objects, REGION_WEIGHTS)
    # A sum over the four numbers, and divided by all samples, not by the objects among them: the
    # weight of boxes relative to classes depends on it.
    distance = _smooth_l1(codes - truth).sum(axis=-1)
    return (
        jnp.where(objects | background, entropy, 0).sum() / total,
        jnp.where(objects, distance, 0).sum() / total,
    )


def choose(
    key: jax.Array,
    proposals: jax.Array,
    there: jax.Array,
    boxes: jax.Array,
    classes: jax.Array,
    *,
    count: int,
) -> Chosen:
    """Draws proposals to learn from: a quarter objects at most, filled up with background.

    Args:
      key: draws.
      proposals: (n, 4).
      there: (n,) False for padding.
      boxes: (objects, 4).
      classes: (objects,) 0 for padding.
      count: how many.
    """
    # The true boxes are proposals too, so that the heads see objects from the first step on.
    proposals = jnp.concatenate([boxes, proposals])
    there = jnp.concatenate([classes > 0, there])
    # One threshold: every proposal is an object or background.
    found = match(proposals, boxes, classes > 0, above=0.5, below=0.5)
    found = found._replace(
        is_object=found.is_object & there, is_background=found.is_background & there
    )
    objects, background = sample(key, found, count=count, share=0.25)
    # Objects first, then background, then what was not drawn, which weighs nothing.
    priority = 2 * objects.astype(jnp.int32) + background.astype(jnp.int32)
    rank, at = jax.lax.top_k(priority, min(count, len(priority)))
    return Chosen(
        boxes=proposals[at],
        object=found.object[at],
        classes=jnp.where(rank == 2, classes[found.object[at]], 0),
        weights=(rank > 0).astype(proposals.dtype),
    )


def box_losses(
    chosen: Chosen, logits: jax.Array, codes: jax.Array, boxes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of the classes, and smooth L1 of the objects' codes.

    Args:
      chosen: proposals.
      logits: (n, classes).
      codes: (n, classes, 4); those of the true class are learned.
      boxes: (objects, 4).

    Returns:
      Both sums over the number of samples.
    """
    total = jnp.maximum(chosen.weights.sum(), 1)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, chosen.classes)
    is_object = chosen.classes > 0
    truth = _coded(boxes[chosen.object], chosen.boxes, is_object, BOX_WEIGHTS)
    # Background takes the codes of class 0, which `is_object` leaves out of the loss below.
    own = codes[jnp.arange(len(codes)), chosen.classes]
    distance = _smooth_l1(own - truth).sum(axis=-1)
    return (
        (chosen.weights * entropy).sum() / total,
        jnp.where(is_object, distance, 0).sum() / total,
    )


def mask_loss(chosen: Chosen, logits: jax.Array, masks: jax.Array, *, stride: int = 1) -> jax.Array:
    """Mean binary cross entropy of the masks drawn for objects, 0 where there is no object.

    Args:
      chosen: proposals.
      logits: (n, size, size, classes); those of the true class are learned.
      masks: (objects, height / stride, width / stride).
      stride: pixels of the image between two of a mask.
    """
    is_object = chosen.classes > 0
    size = logits.shape[1]
    # Every object's mask is a level of its own, and each box reads from its object's.
    levels = [mask[..., None].astype(logits.dtype) for mask in masks]
    truth = roi_align(levels, (stride,) * len(levels), chosen.boxes, chosen.object, size)[..., 0]
    own = jnp.take_along_axis(logits, chosen.classes[:, None, None, None], axis=-1)[..., 0]
    entropy = optax.sigmoid_binary_cross_entropy(own, truth).mean(axis=(1, 2))
    return jnp.where(is_object, entropy, 0).sum() / jnp.maximum(is_object.sum(), 1)


def _coded(
    boxes: jax.Array, anchors: jax.Array, is_object: jax.Array, weights: tuple[float, ...]
) -> jax.Array:
    """Codes of objects; zero elsewhere, where boxes without sides would have none."""
    # `where` after the logarithm would be too late: its gradient would still be NaN.
    unit = jnp.array([0, 0, 1, 1], boxes.dtype)
    boxes, anchors = (jnp.where(is_object[:, None], x, unit) for x in (boxes, anchors))
    return encode(boxes, anchors, weights)


def _smooth_l1(difference: jax.Array) -> jax.Array:
    # Huber's slope is `delta` far from zero, and that of the smooth L1 loss is 1.
    return optax.huber_loss(difference, delta=_BETA) / _BETA
