"""The methods that a run can train with: name -> sparsifier, transformation, schedule.

To add a method, add a row to `METHODS`. What it remembers belongs in the sparsifier's state, and
what it does to the gradient belongs in its transformation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import nmjax
from experiments.tasks.task import Recipe, learning_rate
from nmjax import methods, patterns
from nmjax.patterns import Pattern
from nmjax.pruning import Masks

# At -lambda_w itself the network learns nothing: pruned weights grow exponentially until they
# displace the kept ones, again and again. This fraction is enough to see the harm.
NEGATIVE_FRACTION = -0.1


class Strengths(NamedTuple):
    """What may differ between runs of one program: numbers, or one for each seed.

    Attributes:
      lambda_w: strength of the sparse-refined term.
      rate: factor of the recipe's learning rate.
      decay: factor of its weight decay.
    """

    lambda_w: ArrayLike
    rate: ArrayLike = 1.0
    decay: ArrayLike = 1.0


class Method(NamedTuple):
    """How the training loop trains sparse.

    Attributes:
      sparsifier: makes the forward pass sparse.
      transform: lambda_w -> what comes first in the optimizer's chain. `lambda_w` is traced, so
        runs that differ only in it share one compilation.
      decoupled: whether it comes after momentum or Adam instead, as AdamW's weight decay does.
      restarts: optimizer steps at which the learning rate's schedule starts again from warm-up.
      refresh_every: optimizer steps from one refresh of the sparsifier to the next, 1 for within
        each step; None for once an epoch, before its first step.
      rearranges_at: optimizer step before which the network's channels are sorted by size, as
        `experiments.training.rearranging` has it; None for never.
      masks: the sparsifier's state -> the masks that it remembers, which the optimizer also gets;
        None for methods that compute masks from the weights.
      plan: of the trained network, to pack it; None if that is dense.
      adam: takes the place of Adam in a recipe that has it; None for Adam.
      follow: (the sparsifier's state, the optimizer's) -> the sparsifier's, after each step.
    """

    sparsifier: nmjax.Sparsifier
    transform: Callable[[ArrayLike], optax.GradientTransformation]
    decoupled: bool = False
    restarts: tuple[int, ...] = ()
    refresh_every: int | None = None
    rearranges_at: int | None = None
    masks: Callable[[Any], Masks] | None = None
    plan: nmjax.Plan | None = None
    adam: optax.GradientTransformation | None = None
    follow: Callable[[Any, Any], Any] = lambda state, opt_state: state


Build = Callable[[nmjax.Plan, Recipe, int], Method]


class Row(NamedTuple):
    """One row of `METHODS`.

    Attributes:
      build: (plan, recipe, steps in an epoch) -> the method. Rows with the same `build` are the
        same program with another `lambda_w`.
      lambda_fraction: of the recipe's `lambda_w`; 0 where the method has none.
      what: one line for tables and help.
      blocks_only: whether it takes only 1xN patterns.
      decoupled: whether its strength is a fraction of the recipe's `lambda_decoupled` instead.
    """

    build: Build
    lambda_fraction: float
    what: str
    blocks_only: bool = False
    decoupled: bool = False

    def strength(self, recipe: Recipe) -> float:
        """The `lambda_w` that the method trains with."""
        return self.lambda_fraction * recipe.strength(decoupled=self.decoupled)


def dense(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    """No sparsity."""
    del plan, recipe, steps_per_epoch
    return _DENSE


def one_shot(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    """Dense for half of the epochs, then pruned by magnitude and fine-tuned with that mask.

    The learning rate starts again with the fine-tuning. The budget is that of other methods.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (ASP).
    """
    # Whole epochs, so that the masks are fixed where an epoch begins.
    half = recipe.epochs // 2 * steps_per_epoch
    return Method(
        nmjax.one_shot(plan, at_step=half),
        _nothing,
        restarts=(half,) if half else (),
        masks=_state_masks,
        plan=plan,
    )


def one_by_n(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    """`one_shot` with blocks that compete within a whole layer, so rows keep unequal numbers.

    Before the blocks are chosen, the trained network's channels are sorted by the L1 norm of their
    filters, so that a block holds filters of similar size.

    The published method starts from a pretrained network and fine-tunes it for 180 epochs at a
    tenth of its learning rate. Here both halves share the budget of the other methods.

    Source: Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks", TPAMI 2022.
    """
    # A single epoch has no dense half: its blocks are chosen from the first weights, unsorted.
    half = recipe.epochs // 2 * steps_per_epoch or None
    return one_shot(_over_layers(plan), recipe, steps_per_epoch)._replace(rearranges_at=half)


def subp(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    """SUBP: uniform blocks ranked by size and angular redundancy, dropped gradually, may regrow.

    Masks are refreshed once per epoch. The ramp is the recipe's; the pull is that of SR-STE.

    Source: Xiang et al., "SUBP: Soft Uniform Block Pruning", NeurIPS 2023.
    """
    return _soft_uniform("bpar", plan, recipe, steps_per_epoch)


def subp_l1(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    """SUBP with blocks ranked by size alone, the default of the released code."""
    return _soft_uniform("l1", plan, recipe, steps_per_epoch)


def straight_through(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    """STE: masks from the weights at every step, gradient straight through to every weight."""
    del recipe, steps_per_epoch
    return Method(nmjax.straight_through(plan), _nothing, plan=plan)


def sparse_refined(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    """SR-STE: STE that also pulls pruned weights toward zero."""
    del recipe, steps_per_epoch
    return Method(
        nmjax.straight_through(plan),
        lambda lambda_w: nmjax.add_sparse_refined(plan, lambda_w),
        plan=plan,
    )


def sparse_refined_decoupled(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    """SR-STE with the pull after the preconditioner: a step shrinks by rate * lambda_w exactly."""
    return sparse_refined(plan, recipe, steps_per_epoch)._replace(decoupled=True)


# (plan, recipe, the step that a share of the training ends at) -> a method of the library.
Make = Callable[[nmjax.Plan, Recipe, int], nmjax.Sparsifier | methods.Method]


def by_schedule(share: float, make: Make, part: Literal["", "pull", "adam"] = "") -> Build:
    """A method that moves with every step, until this share of the training is done.

    `part` is "pull" for one with the sparse-refined term, "adam" for one that replaces Adam.
    """

    def build(plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
        made = make(plan, recipe, max(round(share * recipe.epochs * steps_per_epoch) - 1, 1))
        if not isinstance(made, methods.Method):
            pull = partial(nmjax.add_sparse_refined, plan) if part else _nothing
            return Method(made, pull, refresh_every=1, plan=plan)
        if part == "adam" and recipe.optimizer == "sgd":
            raise ValueError("this method replaces Adam, and the task's recipe trains with SGD")
        method = Method(made.sparsifier, _nothing, refresh_every=1, plan=plan, follow=made.follow)
        if part == "adam":
            return method._replace(
                adam=made.transformation, masks=lambda s: getattr(s, "masks", {})
            )
        return method._replace(transform=lambda lambda_w: made.transformation)

    return build


METHODS: dict[str, Row] = {
    "dense": Row(dense, 0.0, "no sparsity"),
    "one_shot": Row(one_shot, 0.0, "train dense, prune halfway, fine-tune with a fixed mask"),
    "ste": Row(straight_through, 0.0, "sparse from the first step, straight-through gradient"),
    "sr_ste": Row(sparse_refined, 1.0, "STE that also pulls pruned weights toward zero"),
    "sr_ste_decoupled": Row(
        sparse_refined_decoupled,
        1.0,
        "SR-STE with the pull after momentum or Adam, decoupled like AdamW's weight decay",
        decoupled=True,
    ),
    "sr_ste_negative": Row(
        sparse_refined, NEGATIVE_FRACTION, "STE that also pushes pruned weights away from zero"
    ),
    "decaying_mask": Row(
        by_schedule(0.6, lambda plan, _, end: methods.decaying_mask(plan, 0, end), "pull"),
        1.0,
        "SR-STE whose pruned weights fade out over 60% of the steps",
    ),
    "decaying_mask_scaled": Row(
        by_schedule(
            0.9, lambda plan, _, end: methods.decaying_mask(plan, 0, end, gradient="scaled")
        ),
        0.0,
        "pruned weights fade out over 90% of the steps, and their gradient with them",
    ),
    "dense_then": Row(
        by_schedule(0.3, lambda plan, _, end: methods.dense_then(plan, end)),
        0.0,
        "dense for 30% of the steps, then STE",
    ),
    "max_q": Row(
        by_schedule(0.25, lambda p, _, end: methods.max_q(p, nmjax.linear_ramp(0, end)), "pull"),
        1.0,
        "MaxQ: one group after the other becomes sparse, kept weights are weighed",
    ),
    "s_ste": Row(
        by_schedule(1.0, lambda plan, _, end: methods.s_ste(plan)),
        0.0,
        "S-STE: kept weights shrink by the largest pruned one",
    ),
    "step": Row(
        by_schedule(0.5, lambda plan, _, end: methods.step(plan, end // 5, end + 1), "adam"),
        0.0,
        "STEP: dense until Adam's second moment has settled, then STE with that moment",
    ),
    "cast": Row(
        by_schedule(1.0, lambda plan, _, end: methods.cast(plan, end), "adam"),
        0.0,
        "CAST: dense, with an Adam that drives pruned weights to zero",
    ),
    "lbc": Row(
        by_schedule(0.5, lambda plan, task, end: methods.lbc(plan, 0, end, task.learning_rate)),
        0.0,
        "LBC: every group learns which combination of weights to keep",
    ),
    "one_by_n": Row(
        one_by_n,
        0.0,
        "one-shot after sorting the channels by size; the blocks of a layer compete, so rows keep "
        "unequal numbers",
        True,
    ),
    "subp_l1": Row(
        subp_l1, 1.0, "pruned gradually, pruned blocks may return; ranked by L1 norm", True
    ),
    "subp": Row(
        subp, 1.0, "pruned gradually, pruned blocks may return; ranked by norm and angle", True
    ),
}


def find_row(name: str) -> Row:
    """Returns the row of a method.

    Raises:
      ValueError: there is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"no method named {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]


def check_fits(
    name: str,
    pattern: str | Pattern,
    lambda_w: float | None = None,
    lambda_decoupled: float | None = None,
) -> None:
    """Checks what a method is given.

    Args:
      name: of the method.
      pattern: that it trains at.
      lambda_w: strength of the sparse-refined term, where one was asked for.
      lambda_decoupled: the same after the preconditioner.

    Raises:
      ValueError: there is no such method, it does not take the pattern, or it has no sparse-refined
        term.
    """
    row = find_row(name)
    if row.blocks_only and not is_blocks(pattern):
        raise ValueError(
            f"method {name!r} prunes blocks and cannot take {pattern}; give it a pattern such as "
            '"1x16@0.5"'
        )
    strengths = {"--lambda-w": lambda_w, "--lambda-decoupled": lambda_decoupled}
    given = [flag for flag, value in strengths.items() if value is not None]
    if given and row.lambda_fraction == 0:
        raise ValueError(f"method {name!r} has no sparse-refined term: drop {' and '.join(given)}")


def is_blocks(pattern: str | Pattern) -> bool:
    """Whether a pattern is one of 1xN blocks."""
    return patterns.is_blocks(nmjax.parse_pattern(pattern))


def optimizer(
    method: Method, recipe: Recipe, steps_per_epoch: int, lambda_w: ArrayLike | Strengths
) -> optax.GradientTransformationExtraArgs:
    """The recipe's optimizer with the method's own term first in the chain, or after Adam.

    SGD has PyTorch's order: coupled weight decay, momentum, a learning rate for each step. First in
    the chain, the sparse-refined term is clipped with the gradient and goes through momentum or
    Adam's preconditioner. Decoupled, it is a part of the update like AdamW's weight decay.
    """
    given = lambda_w if isinstance(lambda_w, Strengths) else Strengths(lambda_w)
    term, decay = method.transform(given.lambda_w), _weight_decay(recipe, given.decay)
    if recipe.optimizer == "sgd":
        # Decay before momentum is PyTorch's coupled weight decay; after Adam it is AdamW's.
        direction = [decay, optax.trace(recipe.momentum)]
    else:
        adam = optax.scale_by_adam(recipe.momentum, recipe.second_momentum)
        direction = [method.adam or adam, decay]
    # After the term, as in the N:M paper's released code for RAFT.
    clip = [optax.clip_by_global_norm(recipe.clip)] if recipe.clip else []
    return optax.chain(
        *([] if method.decoupled else [term]),
        *clip,
        *direction,
        *([term] if method.decoupled else []),
        optax.scale_by_learning_rate(learning_rate(recipe, steps_per_epoch, method.restarts)),
        *([optax.scale(given.rate)] if isinstance(lambda_w, Strengths) else []),
    )


def _weight_decay(recipe: Recipe, factor: ArrayLike) -> optax.GradientTransformation:
    mask = None if recipe.decay_vectors else _has_several_axes
    return optax.add_decayed_weights(recipe.weight_decay * factor, mask=mask)


def _nothing(lambda_w: ArrayLike) -> optax.GradientTransformation:
    del lambda_w
    return optax.identity()


def _soft_uniform(score: str, plan: nmjax.Plan, recipe: Recipe, steps_per_epoch: int) -> Method:
    # Rounded to whole epochs, because masks are refreshed once per epoch.
    begin, end = (round(share * recipe.epochs) * steps_per_epoch for share in recipe.ramp)
    return Method(
        nmjax.soft_uniform_blocks(plan, nmjax.cubic_ramp(begin, end), score=score),
        lambda lambda_w: nmjax.add_sparse_refined(plan, lambda_w),
        masks=_state_masks,
        plan=plan,
    )


def _over_layers(plan: nmjax.Plan) -> nmjax.Plan:
    """The plan with blocks that compete within a layer."""

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, nmjax.LeafPlan):
            return leaf
        # `check_fits` has made sure that the plan has blocks and no other pattern.
        blocks = cast(nmjax.Block1xN, leaf.pattern)
        return dataclasses.replace(leaf, pattern=dataclasses.replace(blocks, uniform=False))

    leaves = tuple((name, widen(leaf)) for name, leaf in plan.leaves)
    return dataclasses.replace(plan, leaves=leaves)


def _has_several_axes(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def _state_masks(state: Any) -> Masks:
    masks: Masks = getattr(state, "masks", {})
    return masks


# One object, so that dense runs share one compilation.
_DENSE = Method(nmjax.dense(), _nothing)
