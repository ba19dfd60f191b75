"""The methods of the ladder, and the settings that each may choose from on the validation split.

Every method has the same budget of three: the recipe, twice its learning rate, and another value of
its strength, or of the weight decay where it has no strength. These are factors of the recipe, so
one list serves all tasks. How long a schedule lasts is a part of the method here: methods published
with several lengths have several rungs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

import nmjax
from experiments.tasks.task import Recipe
from experiments.training import methods as training
from nmjax import methods


class Setting(NamedTuple):
    """Factors of the recipe's learning rate, of its weight decay and of a method's strength."""

    rate: float = 1.0
    decay: float = 1.0
    pull: float = 1.0

    @property
    def title(self) -> str:
        """What differs from the recipe, such as "rate x2"."""
        factors = zip(self._fields, self, strict=True)
        return (
            ", ".join(f"{name} x{factor:g}" for name, factor in factors if factor != 1) or "recipe"
        )


class Rung(NamedTuple):
    """A method of the ladder.

    Attributes:
      build: plan, recipe, steps in an epoch -> the method.
      what: one line for the page.
      pulls: whether it has the sparse-refined term, whose strength is then tuned.
      adam: whether it needs a recipe with Adam.
    """

    build: training.Build
    what: str
    pulls: bool = False
    adam: bool = False

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The budget."""
        own = Setting(pull=0.3) if self.pulls else Setting(decay=10.0)
        return Setting(), Setting(rate=2.0), own


BUDGET = 3


def _decaying(share: float, part: Any = "", **options: Any) -> training.Build:
    return training.by_schedule(
        share, lambda plan, _, end: methods.decaying_mask(plan, 0, end, **options), part
    )


def _max_q(share: float, **options: Any) -> training.Build:
    return training.by_schedule(
        share,
        lambda plan, _, end: methods.max_q(plan, nmjax.linear_ramp(0, end), **options),
        "pull",
    )


def _dense_then_sr_ste(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> training.Method:
    """SR-STE after 30% of the steps; the dense part is not pulled."""
    at_step = round(0.3 * recipe.epochs * steps_per_epoch)

    def pull(lambda_w: ArrayLike) -> Any:
        return nmjax.add_sparse_refined(plan, lambda step: jnp.where(step < at_step, 0.0, lambda_w))

    sparsifier = methods.dense_then(plan, at_step)
    return training.Method(sparsifier, pull, refresh_every=1, plan=plan)


def _averaged(
    drop: float | None, plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int
) -> training.Method:
    """Three cycles of a tenth of the epochs, each with a learning rate that starts again.

    The average is complete one epoch before the end: the last epoch only collects its batch
    statistics.
    """
    every = max(recipe.epochs // 10, 1) * steps_per_epoch
    begin = (recipe.epochs - 1) * steps_per_epoch - 3 * every
    return training.Method(
        methods.sup_tickets(plan, begin, every, 3, drop=drop),
        partial(nmjax.add_sparse_refined, plan),
        restarts=tuple(begin + cycle * every for cycle in range(3)),
        refresh_every=1,
        plan=plan,
    )


def _step(plan: nmjax.Plan, recipe: Recipe, end: int) -> methods.Method:
    return methods.step(plan, end // 5, end + 1, b1=recipe.momentum, b2=recipe.second_momentum)


def _cast(plan: nmjax.Plan, recipe: Recipe, end: int) -> methods.Method:
    return methods.cast(plan, end, b1=recipe.momentum, b2=recipe.second_momentum)


RUNGS: dict[str, Rung] = {
    "dense": Rung(training.dense, "no sparsity"),
    "ste": Rung(training.straight_through, "masks from the weights at every step"),
    "sr_ste": Rung(training.sparse_refined, "STE with a pull on pruned weights", pulls=True),
    "sr_ste_decoupled": Rung(
        training.sparse_refined_decoupled,
        "SR-STE with the pull after Adam",
        pulls=True,
        adam=True,
    ),
    "one_shot": Rung(training.one_shot, "dense for half of the steps, pruned, fine-tuned"),
    "dense_then": Rung(
        training.by_schedule(0.3, lambda plan, _, end: methods.dense_then(plan, end)),
        "dense for 30% of the steps, then STE",
    ),
    "dense_then_sr_ste": Rung(
        _dense_then_sr_ste, "dense for 30% of the steps, then SR-STE", pulls=True
    ),
    "decaying_mask": Rung(
        _decaying(0.6, "pull"),
        "SR-STE; pruned weights fade out exponentially over 60% of the steps",
        pulls=True,
    ),
    "decaying_mask_linear": Rung(
        _decaying(0.6, "pull", decay="linear"), "the same, linearly", pulls=True
    ),
    "decaying_mask_published": Rung(
        _decaying(0.6), "pruned weights fade out exponentially, straight gradient, no pull"
    ),
    "decaying_mask_scaled": Rung(
        _decaying(0.9, gradient="scaled"),
        "pruned weights and their gradient fade out exponentially over 90% of the steps, no pull",
    ),
    "structure_decay": Rung(
        _decaying(0.6, "pull", decay="stepwise"),
        "SR-STE at M-1:M, then half, a quarter, ... over 60% of the steps",
        pulls=True,
    ),
    "max_q": Rung(
        _max_q(0.25), "SR-STE; groups become sparse over 25% of the steps; soft mask", pulls=True
    ),
    "max_q_ramp": Rung(
        _max_q(0.6, soft=False), "SR-STE; groups become sparse over 60% of the steps", pulls=True
    ),
    "s_ste": Rung(
        training.by_schedule(1.0, lambda plan, _, end: methods.s_ste(plan)),
        "kept weights shrink by the largest pruned one",
    ),
    "lbc": Rung(
        training.by_schedule(
            0.5, lambda plan, recipe, end: methods.lbc(plan, 0, end, recipe.learning_rate)
        ),
        "learns which combination of each group to keep, over 50% of the steps",
    ),
    "sup_tickets": Rung(
        partial(_averaged, 0.5), "SR-STE, then the average of 3 tickets", pulls=True
    ),
    "averaged": Rung(partial(_averaged, None), "SR-STE, averaged like sup_tickets", pulls=True),
    "step": Rung(
        training.by_schedule(0.5, _step, "adam"),
        "dense until Adam's moment has settled, then STE with that moment",
        adam=True,
    ),
    "cast": Rung(
        training.by_schedule(1.0, _cast, "adam"),
        "dense; Adam drives pruned weights to zero",
        adam=True,
    ),
}
