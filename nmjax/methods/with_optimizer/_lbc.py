"""LBC: every group learns which combination of its weights to keep, and forgets the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from nmjax.masks.arguments import check_number
from nmjax.masks.ranking import keep_highest, signed_keys
from nmjax.methods.groups import check_nm, cut
from nmjax.methods.sparsifier import (
    Method,
    Sparsifier,
    check_count,
    check_rates,
    check_steps,
    export_masked,
    masks_of,
    part_of,
)
from nmjax.patterns import NM, LeafPlan
from nmjax.plans import Plan, check_plan
from nmjax.pruning import planned_leaves, sparsify
from nmjax.transforms import NO_PARAMS
from nmjax.trees.leaves import map_named, named_leaves

if TYPE_CHECKING:
    import chex

# 4:8 has 70 candidates, 8.75 numbers for each weight; 8:16 would have 12,870, or 804.
_MOST = 1000
# The number of live candidates must not depend on rounding in float32.
_ROUNDING = 1e-4


class LbcState(NamedTuple):
    """State of the sparsifier of `lbc`.

    Attributes:
      masks: leaf name -> boolean array: the weights of the candidates that are alive.
    """

    masks: Mapping[str, jax.Array]


class LearnCandidatesState(NamedTuple):
    """State of the transformation of `lbc`.

    Attributes:
      count: int32 scalar, number of updates so far.
      scores: leaf name -> float32 (..., groups, candidates); 0 where dead.
      trace: their momentum.
      live: leaf name -> booleans of the same shape.
    """

    # `count` hides tuple.count.
    count: jax.Array  # type: ignore[assignment]
    scores: Mapping[str, jax.Array]
    trace: Mapping[str, jax.Array]
    live: Mapping[str, jax.Array]


def lbc(
    plan: Plan,
    begin: int,
    end: int,
    learning_rate: float | Callable[[chex.Numeric], chex.Numeric],
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    steps_per_epoch: int = 1,
) -> Method:
    """Learns a score for each of the C(M, N) masks of a group, and drops the lowest, one by one.

    A weight is kept while one candidate that holds it is alive. The score of candidate c moves by
    the gradient sum of w_j g_j over its weights j, the first-order change of the loss if they were
    dropped, summed up by SGD with momentum. After each update, the lowest scores of a group die for
    good, until only

        1 + ceil((C - 1) (1 - (e - begin) / (end - begin))^3)

    are alive: 6, 3, 2 and 1 of 6 at the beginning, a third, half and the end of the schedule. The
    weights themselves get the gradient times the mask.

    The transformation goes first in the optimizer's chain; call `follow` after each update. The
    scores are part of its state, so parameters and checkpoints of the model do not change.

    Args:
      plan: from `nmjax.make_plan`, with N:M patterns.
      begin: update until which all candidates live; 0 as published.
      end: update from which one lives; after half of the training as published.
      learning_rate: of the scores, a number or a schedule of the update count; as published that of
        the weights.
      momentum: of the scores.
      weight_decay: of the scores.
      steps_per_epoch: updates e to which the count is rounded down, 1 to let candidates die after
        each update. As published those of an epoch.

    Returns:
      A sparsifier with state `LbcState`, a transformation with state `LearnCandidatesState`, and
      `follow`, which carries the masks over. Export raises while several candidates live.

    Raises:
      TypeError: `plan` is not a plan; a number of steps is not an integer; another number is none.
      ValueError: not 0 <= begin < end; not 0 <= momentum < 1; a leaf has another kind of pattern,
        one with more than 1000 candidates, or no gradient.

    Source: Zhang et al., "Learning Best Combination for Efficient N:M Sparsity", NeurIPS 2022, and
    `ResNet/utils/conv_type.py` of zyxxmu/LBC, whose scores are parameters of the model. Theirs
    picks the dead at the beginning of a forward pass, which is the same moment.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> sparsifier, learn, follow = lbc(nmjax.make_plan(params, "2:4"), 0, 4, 0.1)
    >>> state, opt_state = sparsifier.init(params, jax.random.key(0)), learn.init(params)
    >>> grads = {"kernel": jnp.array([[1.0], [0.0], [-1.0], [-1.0]])}  # of the sparse weights
    >>> for _ in range(4):
    ...     _, opt_state = learn.update(grads, opt_state, params)
    ...     state = follow(state, opt_state)
    >>> sparsifier.export(params, state)["kernel"].ravel().tolist()
    [0.0, 0.0, 2.0, 1.0]
    """
    check_plan(plan)
    check_nm(plan, "lbc")
    check_steps(begin=begin, end=end)
    check_count(steps_per_epoch=steps_per_epoch)
    check_rates(momentum=momentum)
    check_number("weight_decay", weight_decay)
    if not (callable(learning_rate) or hasattr(learning_rate, "dtype")):
        check_number("learning_rate", learning_rate)
    members = {name: _members(name, leaf) for name, leaf in plan.items()}

    def update_leaf(
        name: str, g: jax.Array, w: jax.Array, state: LearnCandidatesState
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        scores, trace, live = (part[name] for part in (state.scores, state.trace, state.live))
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        groups, whole = cut(g, plan[name])
        wide = np.promote_types(w.dtype, np.float32)
        products = groups.astype(wide) * cut(w, plan[name]).weights.astype(wide)
        kept = whole(_held(live, members[name]))
        slope = _matmul(products, members[name].T) + weight_decay * scores
        trace = momentum * trace + slope.astype(trace.dtype)
        scores = scores - jnp.asarray(rate, scores.dtype) * trace
        epoch = (state.count + 1) // steps_per_epoch * steps_per_epoch
        count = _live_count(scores.shape[-1], begin, end, epoch)
        ranked = jnp.where(live, scores, -jnp.inf)
        live = live & keep_highest(ranked, signed_keys, count, scores.ndim - 1)
        return jnp.where(kept, g, 0), jnp.where(live, scores, 0), trace, live

    def init(params: chex.ArrayTree) -> LearnCandidatesState:
        leaves = planned_leaves(params, plan)
        scores = {name: _first_scores(w, plan[name], members[name]) for name, w in leaves.items()}
        zeros = {name: jnp.zeros_like(score) for name, score in scores.items()}
        live = {name: jnp.ones_like(score, dtype=bool) for name, score in scores.items()}
        return LearnCandidatesState(jnp.zeros([], jnp.int32), scores, zeros, live)

    def update(
        updates: chex.ArrayTree,
        state: LearnCandidatesState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, LearnCandidatesState]:
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS)
        leaves, grads = planned_leaves(params, plan), named_leaves(updates)
        _check_gradients(grads, leaves)
        done = {name: update_leaf(name, grads[name], w, state) for name, w in leaves.items()}
        masked = map_named(lambda name, g: done[name][0] if name in done else g, updates)
        scores, trace, live = ({n: parts[i] for n, parts in done.items()} for i in (1, 2, 3))
        count = optax.safe_increment(state.count)
        return masked, LearnCandidatesState(count, scores, trace, live)

    def follow(state: LbcState, opt_state: chex.ArrayTree) -> LbcState:
        live = part_of(opt_state, LearnCandidatesState).live

        def mask_of(name: str, mask: jax.Array) -> jax.Array:
            return cut(mask, plan[name]).whole(_held(live[name], members[name]))

        return LbcState({name: mask_of(name, mask) for name, mask in state.masks.items()})

    return Method(
        _sparsifier(plan, end), optax.GradientTransformationExtraArgs(init, update), follow
    )


def _check_gradients(grads: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    missing = sorted(leaves.keys() - grads.keys())
    if missing:
        raise ValueError(
            f"lbc learns from the gradients of all planned leaves, but there are none of "
            f"{', '.join(missing)}; train them, or list them in exclude= of make_plan"
        )


def _members(name: str, leaf: LeafPlan) -> np.ndarray:
    """(candidates, M): which weights each candidate holds, in lexicographic order."""
    pattern = cast(NM, leaf.pattern)
    count = math.comb(pattern.m, pattern.n)
    if count > _MOST:
        raise ValueError(
            f"{name} {leaf.shape}: {pattern} has {count:,} candidates for each group, more than "
            f"{_MOST:,}; choose a pattern with fewer, such as 4:8 (70) or 1:16 (16)"
        )
    kept = itertools.combinations(range(pattern.m), pattern.n)
    return np.array([np.isin(np.arange(pattern.m), held) for held in kept])


def _live_count(candidates: int, begin: int, end: int, epoch: jax.Array) -> jax.Array:
    left = jnp.clip(1 - (epoch - begin) / (end - begin), 0, 1)
    return 1 + jnp.ceil((candidates - 1) * left**3 - _ROUNDING).astype(jnp.int32)


def _first_scores(w: jax.Array, leaf: LeafPlan, members: np.ndarray) -> jax.Array:
    pattern = cast(NM, leaf.pattern)
    # Computed from the weights, so that scores lie where their groups do.
    zeros = _matmul(jnp.zeros_like(cut(w, leaf).weights, jnp.float32), members.T)
    return zeros + 1 / math.comb(pattern.m - 1, pattern.n - 1)


def _held(live: jax.Array, members: np.ndarray) -> jax.Array:
    """The weights that a live candidate holds."""
    return _matmul(live.astype(jnp.float32), members) > 0.5


def _matmul(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    # At default precision TPUs would round the scores to bfloat16.
    return jnp.matmul(x, jnp.asarray(matrix, x.dtype), precision=lax.Precision.HIGHEST)


def _sparsifier(plan: Plan, end: int) -> Sparsifier:
    unfinished = (
        f"lbc keeps one candidate of each group after update {end}, and method.follow(state, "
        "opt_state) carries the masks over."
    )

    def init(params: chex.ArrayTree, key: chex.PRNGKey) -> LbcState:
        del key
        leaves = planned_leaves(params, plan)
        return LbcState({n: jnp.ones_like(w, dtype=bool) for n, w in leaves.items()})

    def export(params: chex.ArrayTree, state: LbcState) -> chex.ArrayTree:
        return export_masked(params, plan, masks_of(state, LbcState), unfinished)

    return Sparsifier(
        init,
        lambda state, params, step: state,
        # Straight through: the scores need the gradient of every weight.
        lambda params, state: sparsify(params, plan, masks_of(state, LbcState)),
        export,
    )
