"""What a task is made from: the model's name, changes to the recipe, and how data is read.

Every file in this folder that defines `task(options) -> Task` is a task:

    @offers("perceptron", "convnet")
    def task(options: Options = DEFAULTS) -> Task:
        return classification_task(
            name="my task", model=make_network(options.model), recipe=options.changed(RECIPE), ...
        )

`--task NAME` calls the `task` of experiments/tasks/NAME.py. `--task PACKAGE.MODULE:FUNCTION` calls
any other function with the same signature, so a task can live outside this repository.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import nmjax
from experiments.data.epochs import Reading
from experiments.tasks.task import Recipe, Task
from nmjax.patterns import is_blocks

_AT_LEAST_ONE = ("epochs", "batch_size")
_AT_LEAST_ZERO = ("workers", "threads", "warmup_epochs", "clip", "weight_decay")
# Momentum and betas of 1 would never forget, and smoothing of 1 would leave no label.
_BELOW_ONE = ("momentum", "second_momentum", "label_smoothing")
_FINITE = ("lambda_w", "lambda_decoupled")


@dataclass(frozen=True)
class Options:
    """The flags that a task is made from. Those that are None or empty use the task's defaults.

    Attributes:
      model: name of the network. Empty for the task's first; the error for an unknown name lists
        them all.
      pattern: N:M keeps N of every M weights; 1xN@S drops a fraction S of the blocks of N output
        channels. Dense training measures the topology that this pattern would have.
      dtype: dtype that the network computes in. Parameters are float32, and masks are computed from
        them.
      validation: hold a part of the training data out and evaluate on it, so that choices can be
        made without the test data.
      data_dir: folder of prepared data sets. None for $TFDS_DATA_DIR or ~/tensorflow_datasets.
      workers: processes that read examples; 0 reads in this one.
      threads: threads that read examples, in each process.
      epochs: passes over the training data. This flag and the following change the task's recipe.
      batch_size: examples per step, over all devices.
      optimizer: sgd (with momentum) or adamw.
      learning_rate: peak learning rate, after a linear warm-up and before the decay.
      schedule: shape of the learning rate's decay.
      warmup_epochs: length of the learning rate's warm-up.
      momentum: SGD's momentum (not Nesterov), or Adam's first beta.
      second_momentum: Adam's second beta.
      clip: largest norm of the gradient of all parameters together; 0 for no limit.
      weight_decay: coupled with SGD, decoupled with AdamW.
      decay_vectors: whether weight decay also acts on biases and the scales of normalizations.
      lambda_w: strength of the sparse-refined term, for the methods that have one.
      lambda_decoupled: its strength for sr_ste_decoupled, after Adam's preconditioner.
      label_smoothing: share of the target that is spread over all classes.
      ramp: when gradual pruning begins and ends, as fractions of the epochs.
    """

    model: str = ""
    pattern: str = "2:4"
    dtype: Literal["float32", "bfloat16"] = "float32"
    validation: bool = False
    data_dir: Path | None = None
    workers: int = 0
    threads: int = 8
    epochs: int | None = None
    batch_size: int | None = None
    optimizer: Literal["sgd", "adamw"] | None = None
    learning_rate: float | None = None
    schedule: Literal["cosine", "linear", "inverse_sqrt"] | None = None
    warmup_epochs: float | None = None
    momentum: float | None = None
    second_momentum: float | None = None
    clip: float | None = None
    weight_decay: float | None = None
    decay_vectors: bool | None = None
    lambda_w: float | None = None
    lambda_decoupled: float | None = None
    label_smoothing: float | None = None
    ramp: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Rejects numbers that make no sense."""
        self._check(_AT_LEAST_ONE, "at least 1", lambda value: value >= 1)
        self._check(_AT_LEAST_ZERO, "at least 0", lambda value: value >= 0)
        self._check(_BELOW_ONE, "from 0 to below 1", lambda value: 0 <= value < 1)
        self._check(_FINITE, "a finite number", lambda value: True)
        self._check(("learning_rate",), "above 0", lambda value: value > 0)
        if self.ramp is not None and not 0 <= self.ramp[0] < self.ramp[1] <= 1:
            raise ValueError(f"ramp must be two rising fractions of the epochs, got {self.ramp}")

    def _check(self, names: tuple[str, ...], wanted: str, is_fine: Callable[[Any], bool]) -> None:
        for name in names:
            value = getattr(self, name)
            # None stands for the recipe's own number.
            if value is not None and not (math.isfinite(value) and is_fine(value)):
                raise ValueError(f"{name} must be {wanted}, got {value}")

    def changed(self, recipe: Recipe) -> Recipe:
        """The recipe with the options of the same names in place of its numbers."""
        # `is not None` below, because 0 is a value: it switches clipping or warm-up off.
        given = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(recipe)}
        return dataclasses.replace(
            recipe, **{name: value for name, value in given.items() if value is not None}
        )

    @property
    def reading(self) -> Reading:
        """How examples are read."""
        return Reading(workers=self.workers, threads=self.threads)

    @property
    def identity(self) -> tuple[tuple[str, str], ...]:
        """What a task adds to its own identity. Runs with and without validation do not mix."""
        return (("split", "validation"),) if self.validation else ()

    @property
    def for_blocks(self) -> bool:
        """Whether the pattern is one of 1xN blocks, which some tasks have another recipe for."""
        # Parsed here, so that a wrong pattern is an error before any data is read.
        return is_blocks(nmjax.parse_pattern(self.pattern))


DEFAULTS = Options()
BOTH_DTYPES = ("float32", "bfloat16")

MakeTask = TypeVar("MakeTask", bound=Callable[..., Task])


def offers(
    *models: str,
    default: str = "",
    dtypes: tuple[str, ...] = ("float32",),
    validation: bool = False,
) -> Callable[[MakeTask], MakeTask]:
    """Declares which models and dtypes a task's constructor supports, and checks its options.

    If no model is named, the constructor finds the default's name in `options.model`. A model,
    dtype or split that is not declared raises ValueError.

    Args:
      *models: names of the networks.
      default: one of them; the first by default.
      dtypes: dtypes that the networks can compute in.
      validation: whether the task can hold a part of its training data out.
    """
    default = default or models[0]

    def declare(make: MakeTask) -> MakeTask:
        @wraps(make)
        def checked(options: Options = DEFAULTS, **details: Any) -> Task:
            model = options.model or default
            if model not in models:
                raise ValueError(f"no model named {model!r}; choose from {', '.join(models)}")
            if options.dtype not in dtypes:
                raise ValueError(f"{model} computes in {' or '.join(dtypes)}, got {options.dtype}")
            if options.validation and not validation:
                raise ValueError("this task holds no training data out: drop --validation")
            return make(dataclasses.replace(options, model=model), **details)

        # A run's folder is named after it before the task is made.
        checked.default_model = default  # type: ignore[attr-defined]
        return cast(MakeTask, checked)

    return declare
