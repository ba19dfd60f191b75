"""What every image classification task shares: cross entropy, accuracy, running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tasks.task import Batch, Recipe, Sums, Task, Variables

Array: TypeAlias = jax.Array | np.ndarray

# Below this many classes the top five are too easy to say anything.
_FEWEST_CLASSES_FOR_TOP5 = 20


def classification_task(
    *,
    name: str,
    model: nn.Module,
    input_shape: tuple[int, ...],
    train_batches: Callable[[int, int], Iterator[Batch]],
    eval_batches: Callable[[], Iterator[Batch]],
    steps_per_epoch: int,
    recipe: Recipe,
    traced_model: nn.Module | None = None,
    **described: Any,
) -> Task:
    """Makes the task of classifying images with a Flax linen module.

    Training minimizes the mean cross entropy over the batch; evaluation sums "count", "loss",
    "accuracy" and, for 20 classes or more, "top5". Whatever dtype the module computes in, the
    loss is float32.

    Args:
      name: of the task.
      model: called as `model(images, train)` with images (batch, *input_shape), returns logits
        (batch, classes). May keep collections such as "batch_stats" and may use the random
        stream "dropout".
      input_shape: of one image, (height, width, channels).
      train_batches: `(seed, epoch) -> batches` with "image" (batch, *input_shape) float32 and
        "label" (batch,) int32.
      eval_batches: `() -> batches`, the same plus "valid" (batch,), 0 where padded.
      steps_per_epoch: how many batches `train_batches` yields.
      recipe: default hyper-parameters; its label smoothing acts on the training loss.
      traced_model: the same function of the same variables, in operations whose channels
        `nmjax.find_channels` can follow; None where those of `model` are.
      **described: other fields of `Task`.

    Returns:
      The task.
    """

    def init(key: jax.Array) -> Variables:
        # Not in training mode, which would ask for a random stream for dropout.
        return dict(model.init(key, jnp.zeros((1, *input_shape), jnp.float32), train=False))

    def learn(
        params: Any, collections: Variables, batch: Batch, key: jax.Array
    ) -> tuple[Any, Variables]:
        variables = {"params": params, **collections}
        rngs, kept = {"dropout": key}, list(collections)
        found: Any = model.apply(variables, batch["image"], train=True, mutable=kept, rngs=rngs)
        return found

    def loss(
        params: Any, collections: Variables, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Variables]:
        logits, updated = learn(params, collections, batch, key)
        # A collection that the module only reads is not among the updated ones.
        losses = cross_entropy(logits, batch["label"], smoothing=recipe.label_smoothing)
        return losses.mean(), {**collections, **updated}

    def logits(
        params: Any, collections: Variables, batch: Batch, key: jax.Array | None
    ) -> jax.Array:
        if key is not None:
            return learn(params, collections, batch, key)[0]
        found: Any = model.apply({"params": params, **collections}, batch["image"], train=False)
        return found

    def evaluate(network: nn.Module, params: Any, collections: Variables, batch: Batch) -> Sums:
        logits: Any = network.apply({"params": params, **collections}, batch["image"], train=False)
        return classification_sums(logits, batch["label"], batch["valid"])

    return Task(
        name=name,
        init=init,
        loss=loss,
        logits=logits,
        evaluate=partial(evaluate, model),
        traceable=None if traced_model is None else partial(evaluate, traced_model),
        train_batches=train_batches,
        eval_batches=eval_batches,
        steps_per_epoch=steps_per_epoch,
        recipe=recipe,
        **described,
    )


def cross_entropy(logits: Array, labels: Array, *, smoothing: float = 0.0) -> jax.Array:
    """Returns -log softmax(logits)[label] of each example, in float32.

    Args:
      logits: (..., classes), any floating dtype.
      labels: (...) integers in [0, classes).
      smoothing: share of the target that is spread over all classes, the label's among them.
    """
    logits = logits.astype(jnp.float32)
    own = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing == 0:
        return own
    # Mean of -log softmax over the classes; no array of one-hot targets, which a vocabulary of
    # tens of thousands makes large.
    mean = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
    return (1 - smoothing) * own + smoothing * mean


def classification_sums(logits: Array, labels: Array, valid: Array) -> Sums:
    """Sums loss and correct answers over the examples of a batch that are not padding.

    An example is correct if fewer than one (for "top5": five) other classes score *more* than
    its label, or as much at a lower index: ties resolve as in `argmax`. A label whose logit is
    NaN is never correct.

    Args:
      logits: (batch, classes).
      labels: (batch,) integers.
      valid: (batch,), 0 where the example is padding.

    Returns:
      "count", "loss", "accuracy" and, for 20 classes or more, "top5": float32 scalars.
    """
    keep = valid != 0
    ahead = _classes_ahead(logits.astype(jnp.float32), labels)
    sums = {
        "count": jnp.where(keep, 1.0, 0.0),
        # `where`, not a product: padding may hold anything, and 0 * inf is NaN.
        "loss": jnp.where(keep, cross_entropy(logits, labels), 0.0),
        "accuracy": jnp.where(keep & (ahead < 1), 1.0, 0.0),
    }
    if logits.shape[-1] >= _FEWEST_CLASSES_FOR_TOP5:
        sums["top5"] = jnp.where(keep & (ahead < 5), 1.0, 0.0)
    return {name: values.sum() for name, values in sums.items()}


def _classes_ahead(logits: Array, labels: Array) -> jax.Array:
    """How many classes an arg-max would pick before the label, (batch,)."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    lower_index = jnp.arange(logits.shape[-1]) < labels[:, None]
    # "not <=" instead of ">" so that a NaN, in the label's logit or another's, counts as ahead.
    ahead = ~(logits <= own) | ((logits == own) & lower_index)
    others = jnp.arange(logits.shape[-1]) != labels[:, None]
    return jnp.sum(ahead & (others | jnp.isnan(own)), axis=-1)
