"""What a task is: data, model, loss, metric and recipe, in the form the training loop takes.

A task is one file in this folder with a constructor that returns a `Task`. The loop in
`experiments.loop` knows nothing else about it, so a translation task and a classification
task run through the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import numpy as np

Batch = dict[str, np.ndarray]
Variables = dict[str, Any]
Sums = dict[str, jax.Array]


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters a task trains with by default.

    Attributes:
      epochs: passes over the training data.
      batch_size: examples per optimizer step, over all devices.
      learning_rate: peak learning rate; linear warm-up from 0, then cosine to 0, per step.
      warmup_epochs: length of the warm-up.
      momentum: of SGD, without Nesterov.
      weight_decay: coupled (added to the gradient).
      decay_vectors: whether weight decay also acts on parameters with one axis: biases and the
        scales of normalisations.
      lambda_w: strength of the sparse-refined term.
      label_smoothing: share of the target that is spread over all classes, in training.
      ramp: when gradual pruning begins and ends, as fractions of the epochs.
    """

    epochs: int = 120
    batch_size: int = 256
    learning_rate: float = 0.1
    warmup_epochs: float = 5.0
    momentum: float = 0.9
    weight_decay: float = 5e-5
    decay_vectors: bool = True
    lambda_w: float = 2e-4
    label_smoothing: float = 0.0
    ramp: tuple[float, float] = (10 / 250, 180 / 250)


@dataclass(frozen=True)
class Task:
    """Everything the training loop needs to know about one problem.

    Attributes:
      name: as given to `--task`.
      init: `key -> {"params": ..., **collections}`, the Flax variables.
      loss: `(params, collections, batch, key) -> (scalar loss, new collections)` in training
        mode. `params` are already sparse.
      evaluate: `(params, collections, batch) -> sums`, a dict of scalars summed over the
        examples of the batch, always with "count" (padding, marked by `batch["valid"] == 0`,
        left out) and "loss"; the rest are metrics such as "accuracy". The loop adds sums up over
        batches and divides by "count".
      train_batches: `(seed, epoch) -> iterator of host batches` of exactly
        `recipe.batch_size` examples, in an order that depends on nothing but its arguments.
      eval_batches: `() -> iterator of host batches`, all of one shape, the last one padded, with
        a "valid" array of 0 and 1.
      steps_per_epoch: length of `train_batches(...)`.
      recipe: default hyper-parameters.
      keep_dense: path rules (regular expressions) of layers that stay dense.
      train_rows: `(*, seed, epoch, first_step, rows) -> iterator of host batches`: those of
        `train_batches(seed, epoch)` from a step on, and of each the rows of a slice. For tasks
        that can leave the others unread; None: they are made and dropped.
    """

    name: str
    init: Callable[[jax.Array], Variables]
    loss: Callable[[Any, Variables, Batch, jax.Array], tuple[jax.Array, Variables]]
    evaluate: Callable[[Any, Variables, Batch], Sums]
    train_batches: Callable[[int, int], Iterator[Batch]]
    eval_batches: Callable[[], Iterator[Batch]]
    steps_per_epoch: int
    recipe: Recipe
    keep_dense: tuple[str, ...] = ()
    train_rows: Callable[..., Iterator[Batch]] | None = None

    def read(self, seed: int, epoch: int, first_step: int, rows: slice) -> Iterator[Batch]:
        """The batches of an epoch from a step on, and of each the given rows."""
        if self.train_rows is not None:
            return self.train_rows(seed=seed, epoch=epoch, first_step=first_step, rows=rows)
        batches = islice(self.train_batches(seed, epoch), first_step, None)
        return ({name: values[rows] for name, values in batch.items()} for batch in batches)
