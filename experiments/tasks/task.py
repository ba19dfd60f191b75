"""What a task is: data, model, loss, metric and recipe, in the form the training loop takes.

A task is one file in this folder whose function `task` returns a `Task`; see
`experiments.tasks.options`. The loop in `experiments.training.loop` knows nothing else about it, so
translation and classification run through the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

# `as` re-exports the names, which tasks need next to `Task`.
from experiments.data.batches import Batch as Batch
from experiments.data.batches import Rows as Rows
from experiments.tasks.learning_rates import in_parts

Variables = dict[str, Any]
Sums = dict[str, jax.Array]
Shown = dict[str, str]


@dataclass(frozen=True)
class Metric:
    """A number that measures how good a network is.

    Attributes:
      name: its key among the test metrics.
      unit: of the numbers shown; "" where the name says it.
      step: unit of differences.
      perfect: the best possible value. If it is 0, lower is better.
      scale: factor from the value to the number shown.
      close: a difference from dense, in the value, that counts as close.
    """

    name: str = "accuracy"
    unit: str = "%"
    step: str = "points"
    perfect: float = 1.0
    scale: float = 100.0
    close: float = 0.01

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is."""
        return 1 if self.perfect > 0 else -1

    @property
    def title(self) -> str:
        """Name and unit, for tables and axes."""
        return f"{self.name} {self.unit}".strip()

    @property
    def missing_title(self) -> str:
        """Title of the numbers that `missing` returns."""
        if self.perfect == 0:
            return self.title
        return f"error, {self.scale * self.perfect:g} - {self.title}"

    @property
    def digits(self) -> int:
        """Decimals worth showing."""
        return 2 if self.scale == 100 else 3

    def missing(self, value: Any) -> Any:
        """How far a value is from perfect, in the numbers shown; arrays too."""
        return self.sign * self.scale * (self.perfect - value)


@dataclass(frozen=True)
class Compared:
    """What `experiments.compare` trains on a task by default; see the flags of the same names."""

    patterns: tuple[str, ...] = ("2:4",)
    methods: tuple[str, ...] = ("dense", "ste", "sr_ste")
    block_patterns: tuple[str, ...] = ()
    block_methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    sweep: tuple[float, ...] = ()
    shapes: str = ""


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters a task trains with by default.

    Attributes:
      epochs: passes over the training data.
      batch_size: examples per optimizer step, over all devices.
      optimizer: "sgd" with momentum, without Nesterov, or "adamw".
      learning_rate: peak learning rate.
      schedule: after a linear warm-up from 0, per step: "cosine" or "linear" to 0, or
        "inverse_sqrt", in proportion to 1 / sqrt(step).
      warmup_epochs: length of the warm-up.
      momentum: of SGD, or Adam's first beta.
      second_momentum: Adam's second beta.
      clip: largest norm of the gradient of all parameters together; 0 for no limit.
      weight_decay: coupled (added to the gradient) with SGD; decoupled with AdamW.
      decay_vectors: whether weight decay also acts on parameters with one axis: biases and the
        scales of normalizations.
      lambda_w: strength of the sparse-refined term, as a part of the gradient.
      lambda_decoupled: its strength where it comes after Adam's preconditioner.
      label_smoothing: share of the target that is spread over all classes, in training.
      ramp: when gradual pruning begins and ends, as fractions of the epochs.
    """

    epochs: int = 120
    batch_size: int = 256
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    schedule: Literal["cosine", "linear", "inverse_sqrt"] = "cosine"
    warmup_epochs: float = 5.0
    momentum: float = 0.9
    second_momentum: float = 0.999
    clip: float = 0.0
    weight_decay: float = 5e-5
    decay_vectors: bool = True
    lambda_w: float = 2e-4
    lambda_decoupled: float = 0.0
    label_smoothing: float = 0.0
    ramp: tuple[float, float] = (10 / 250, 180 / 250)

    def strength(self, *, decoupled: bool) -> float:
        """Strength of the sparse-refined term, by its place in the optimizer."""
        return self.lambda_decoupled if decoupled else self.lambda_w


def learning_rate(
    recipe: Recipe, steps_per_epoch: int, restarts: tuple[int, ...] = ()
) -> optax.Schedule:
    """Linear warm-up from 0, then the recipe's decay; once from each restart to the next.

    Cosine and linear end at 0. The inverse square root is `peak * sqrt(warmup / step)`.
    """
    steps, warmup = recipe.epochs * steps_per_epoch, round(recipe.warmup_epochs * steps_per_epoch)
    return in_parts(recipe.schedule, recipe.learning_rate, warmup, steps, restarts)


def total_rate(recipe: Recipe, steps_per_epoch: int) -> float:
    """Sum of the learning rate over all steps of a run without restarts."""
    steps = recipe.epochs * steps_per_epoch
    rates = jax.vmap(learning_rate(recipe, steps_per_epoch))(jnp.arange(steps))
    return float(jnp.sum(rates))


@dataclass(frozen=True)
class Task:
    """Everything the training loop needs to know about one problem.

    Attributes:
      name: for tables and files.
      init: `key -> {"params": ..., **collections}`, the Flax variables.
      loss: `(params, collections, batch, key) -> (scalar loss, new collections)` in training
        mode. `params` are already sparse.
      evaluate: `(params, collections, batch) -> sums`, a dict of scalars summed over the
        examples of the batch, always with "count" (padding, marked by `batch["valid"] == 0`,
        left out) and "loss"; the rest are metrics such as "accuracy". The loop adds the sums of
        all batches and divides by "count".
      train_batches: `(seed, epoch) -> iterator of host batches` of exactly
        `recipe.batch_size` examples, in an order that depends only on the arguments.
      eval_batches: `() -> iterator of host batches`, all of one shape, the last one padded, with
        a "valid" array of 0 and 1.
      steps_per_epoch: length of `train_batches(...)`.
      recipe: default hyper-parameters.
      keep_dense: path rules (regular expressions) of layers that stay dense.
      metrics: which of the test metrics are shown. The first is the one that methods are
        compared by.
      predict: `(params, collections, batch) -> arrays` with one entry per example, such as
        translations; None if `evaluate` is enough.
      score: `(batches, their predictions) -> {name: value}`, for metrics that are not means over
        examples. It runs on the host with NumPy arrays; each batch has only "valid" and the
        arrays in `scored_by`.
      scored_by: names of the arrays in a batch that `score` compares predictions with.
      show: `(params, collections) -> rows of a table`, column -> text: what a trained network does
        with a fixed choice of test examples. The last column is the network's answer, the others
        describe the example. A text from `image_uri` is shown as a picture.
      baselines: name -> the first metric's value with little or no learning.
      notes: sentences about the data found, to print and to report.
      identity: name -> fingerprint of what else decides the result, such as a vocabulary: a run
        is only resumed where these are the same.
      compared: what `experiments.compare` trains by default.
      train_rows: `(*, seed, epoch, first_step, rows) -> iterator of host batches`: those of
        `train_batches(seed, epoch)` from a step on, and of each the given rows. For tasks that can
        skip reading the other rows. None: all rows are made and the others dropped, which is fine
        where data is generated or already in memory.
      eval_rows: `(*, rows_of) -> iterator of host batches`: of each batch of `eval_batches()`, with
        n examples, the rows `rows_of(n)`; rows from the n-th on are padding. None as above.
      traceable: computes what `evaluate` does, in operations whose channels `nmjax.find_channels`
        can follow; None where those of `evaluate` are.
      logits: `(params, collections, batch, key) -> (..., classes)`, what the loss compares with
        the labels; in training mode, or in evaluation if the key is None. None for tasks whose
        networks cannot be distilled.
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
    metrics: tuple[Metric, ...] = (Metric(),)
    predict: Callable[[Any, Variables, Batch], Any] | None = None
    score: Callable[[list[Batch], list[Any]], dict[str, float]] | None = None
    scored_by: tuple[str, ...] = ()
    show: Callable[[Any, Variables], list[Shown]] | None = None
    baselines: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    identity: tuple[tuple[str, str], ...] = ()
    compared: Compared = Compared()
    train_rows: Callable[..., Iterator[Batch]] | None = None
    eval_rows: Callable[..., Iterator[Batch]] | None = None
    traceable: Callable[[Any, Variables, Batch], Any] | None = None
    logits: Callable[[Any, Variables, Batch, jax.Array | None], jax.Array] | None = None

    def __post_init__(self) -> None:
        """Rejects an epoch without steps."""
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"task {self.name}: steps_per_epoch must be at least 1, got "
                f"{self.steps_per_epoch}; a batch has {self.recipe.batch_size} examples"
            )

    def read(self, seed: int, epoch: int, first_step: int, rows: Rows) -> Iterator[Batch]:
        """The batches of an epoch from a step on, and of each the given rows."""
        if self.train_rows is not None:
            return self.train_rows(seed=seed, epoch=epoch, first_step=first_step, rows=rows)
        # Skipped batches are made all the same: their random numbers come first.
        batches = islice(self.train_batches(seed, epoch), first_step, None)
        return ({name: values[rows] for name, values in batch.items()} for batch in batches)

    def read_test(self, rows_of: Callable[[int], Rows]) -> Iterator[Batch]:
        """Of each batch of the test set, with n examples, the rows `rows_of(n)`, as `eval_rows`."""
        if self.eval_rows is not None:
            return self.eval_rows(rows_of=rows_of)
        return (
            {name: _padded_rows(values, rows_of(len(values))) for name, values in batch.items()}
            for batch in self.eval_batches()
        )


def _padded_rows(values: np.ndarray, rows: Rows) -> np.ndarray:
    """The given rows, zeros for those past the end."""
    there = rows[rows < len(values)]
    return np.pad(values[there], [(0, len(rows) - len(there))] + [(0, 0)] * (values.ndim - 1))
