"""The methods that a run can train with: name -> sparsifier, transformation, schedule.

A method is added by one row in `METHODS`. Whatever it needs to remember belongs into the
sparsifier's state, and whatever it does to the gradient into its transformation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import optax
from jax.typing import ArrayLike

import nmjax
from experiments.tasks.task import Recipe

# At -lambda_w itself nothing is learnt: the pruned weights grow exponentially until they displace
# the kept ones, again and again. This fraction of it is enough to see the harm.
NEGATIVE_FRACTION = -0.1


class Method(NamedTuple):
    """How the training loop trains sparse.

    Attributes:
      sparsifier: makes the forward pass sparse.
      transform: lambda_w -> what comes first in the optimizer's chain. `lambda_w` is traced, so
        that runs which differ in nothing else share one compilation.
      restarts: optimizer steps at which the learning rate's schedule starts again from warm-up.
    """

    sparsifier: nmjax.Sparsifier
    transform: Callable[[ArrayLike], optax.GradientTransformation]
    restarts: tuple[int, ...] = ()


Build = Callable[[nmjax.Plan, Recipe, int], Method]


class Row(NamedTuple):
    """One row of `METHODS`.

    Attributes:
      build: (plan, recipe, steps in an epoch) -> the method. Rows with the same `build` are the
        same program with another `lambda_w`.
      lambda_fraction: of the recipe's `lambda_w`; 0 where the method has none.
      what: one line for tables and help.
    """

    build: Build
    lambda_fraction: float
    what: str


def dense(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    """No sparsity."""
    del plan, recipe, steps_per_epoch
    return _DENSE


def one_shot(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    """Dense for half of the epochs, then pruned by magnitude and fine-tuned with that mask.

    The learning rate starts again with the fine-tuning. The budget is that of the other methods.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (ASP).
    """
    half = recipe.epochs // 2 * steps_per_epoch
    return Method(nmjax.one_shot(plan, at_step=half), _nothing, restarts=(half,) if half else ())


def straight_through(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    """STE: masks from the weights at every step, gradient straight through to every weight."""
    del recipe, steps_per_epoch
    return Method(nmjax.straight_through(plan), _nothing)


def sparse_refined(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    """SR-STE: STE with a pull to zero on the pruned weights."""
    del recipe, steps_per_epoch
    return Method(
        nmjax.straight_through(plan), lambda lambda_w: nmjax.add_sparse_refined(plan, lambda_w)
    )


METHODS: dict[str, Row] = {
    "dense": Row(dense, 0.0, "no sparsity"),
    "one_shot": Row(one_shot, 0.0, "train dense, prune half-way, fine-tune with the mask fixed"),
    "ste": Row(straight_through, 0.0, "sparse from the first step, straight-through gradient"),
    "sr_ste": Row(sparse_refined, 1.0, "STE with a pull to zero on the pruned weights"),
    "sr_ste_negative": Row(
        sparse_refined, NEGATIVE_FRACTION, "STE with a push away from zero on the pruned weights"
    ),
}


def find_row(name: str) -> Row:
    """Returns the row of a method.

    Raises:
      ValueError: there is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"no method is called {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]


def learning_rate(
    recipe: Recipe, steps_per_epoch: int, restarts: tuple[int, ...] = ()
) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to 0, per step; once from each restart to the next.

    Args:
      recipe: peak, epochs and warm-up.
      steps_per_epoch: optimizer steps in an epoch.
      restarts: steps, ascending, at which it all starts again.
    """
    ends = (*restarts, recipe.epochs * steps_per_epoch)
    lengths = [end - start for start, end in zip((0, *restarts), ends, strict=True)]
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    parts = [_warmup_cosine(recipe.learning_rate, min(warmup, n // 2), n) for n in lengths]
    return optax.join_schedules(parts, list(restarts))


def optimizer(
    method: Method, recipe: Recipe, steps_per_epoch: int, lambda_w: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """The paper's optimizer with the method's own term first in the chain.

    Coupled weight decay on every parameter, momentum without Nesterov, a learning rate for each
    step: the order of PyTorch's SGD, in which the sparse-refined term goes through momentum.
    """
    return optax.chain(
        method.transform(lambda_w),
        optax.add_decayed_weights(recipe.weight_decay),
        optax.trace(recipe.momentum),
        optax.scale_by_learning_rate(learning_rate(recipe, steps_per_epoch, method.restarts)),
    )


def _nothing(lambda_w: ArrayLike) -> optax.GradientTransformation:
    del lambda_w
    return optax.identity()


# One for all, so that dense runs watched at different patterns share one compilation.
_DENSE = Method(nmjax.dense(), _nothing)


def _warmup_cosine(peak: float, warmup: int, steps: int) -> optax.Schedule:
    cosine = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    if warmup == 0:
        return cosine
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), cosine], [warmup])
