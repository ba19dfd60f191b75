"""Cycles of training, each of which ends in a ticket and begins with new masks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.masks.arguments import check_number
from nmjax.masks.blocks import keep_blocks, score_blocks, split_blocks, spread_blocks
from nmjax.masks.ranking import keep_highest, signed_keys
from nmjax.masks.scores import block_sum, score_weights
from nmjax.methods.sparsifier import check_count, check_steps, map_planned
from nmjax.patterns import LeafPlan
from nmjax.patterns.block1xn import Block1xN, is_blocks
from nmjax.plans import Plan, check_plan
from nmjax.pruning import Masks, compute_masks, planned_leaves
from nmjax.ste import apply_mask, check_lambda, prune_ste, pull_pruned

if TYPE_CHECKING:
    import chex
    from jaxtyping import Array, Bool, Float


def cycle_at(step: chex.Numeric, begin: int, every: int, tickets: int) -> jax.Array:
    """0 before the first cycle, 1 to `tickets` within them, `tickets + 1` after the last."""
    done = jnp.minimum((jnp.asarray(step, jnp.int32) - begin) // every, tickets)
    return jnp.where(jnp.asarray(step) < begin, 0, 1 + done).astype(jnp.int32)


def next_masks(
    params: chex.ArrayTree,
    plan: Plan,
    masks: Masks,
    cycle: jax.Array,
    now: jax.Array,
    tickets: int,
    drop: float | None,
) -> dict[str, jax.Array]:
    """The masks after a refresh that goes from one cycle to another, or stays in it.

    Args:
      params: dense parameters that fit the plan.
      plan: of the method.
      masks: those so far.
      cycle: that of the last refresh.
      now: that of this refresh.
      tickets: number of cycles.
      drop: share of the kept weights that a cycle begins without; None for masks that follow the
        weights.
    """
    old = dict(masks)
    if drop is None:
        return lax.cond(now <= tickets, lambda: compute_masks(params, plan), lambda: old)
    share = drop

    def begin_cycle() -> dict[str, jax.Array]:
        # The first cycle regrows from the masks of the weights.
        base = lax.cond(cycle == 0, lambda: compute_masks(params, plan), lambda: old)
        return regrow_all(params, plan, base, share)

    def stay() -> dict[str, jax.Array]:
        return lax.cond(now == 0, lambda: compute_masks(params, plan), lambda: old)

    return lax.cond((now > cycle) & (now <= tickets), begin_cycle, stay)


def first_masks(
    params: chex.ArrayTree, plan: Plan, begin: int, drop: float | None
) -> dict[str, jax.Array]:
    """The masks before the first refresh; with `begin=0` those of the first cycle."""
    masks = compute_masks(params, plan)
    return masks if begin or drop is None else regrow_all(params, plan, masks, drop)


def regrow_all(
    params: chex.ArrayTree, plan: Plan, masks: Masks, share: float
) -> dict[str, jax.Array]:
    """`regrow` for every planned leaf."""
    leaves = planned_leaves(params, plan)
    return {name: regrow(w, masks[name], plan, name, share) for name, w in leaves.items()}


def regrow(
    w: Float[chex.Array, "*shape"],
    mask: Bool[chex.Array, "*shape"],
    plan: Plan,
    name: str,
    share: float,
) -> Bool[Array, "*shape"]:
    """Drops the lowest of the kept weights or blocks of a leaf, and fills their places.

    Each place is filled within its group, or its row of blocks, by the highest that was not kept
    before. So the mask keeps the pattern.

    Args:
      w: a planned weight.
      mask: True = kept so far.
      plan: of the method.
      name: of the leaf.
      share: of the kept weights, or blocks, that are dropped.
    """
    leaf = plan[name]
    scores = score_weights(lax.stop_gradient(w), plan.score)
    stack = w.ndim - len(leaf.shape)
    if not is_blocks(leaf.pattern):
        rank = _rank(scores, mask, stack, leaf.kept, share)
        return leaf.pattern.mask(rank, leaf.axes, lambda rank: rank)
    block = leaf.pattern
    sums = score_blocks(scores, block.n, leaf.axes, block_sum)
    kept = split_blocks(mask, block.n, leaf.axes)[..., 0]
    rank = _rank(sums, kept, stack, _kept_blocks(leaf, block), share)
    allowed = block.kept_blocks(rank.shape[-1] * (1 if block.uniform else rank.shape[-2]))
    chosen = keep_blocks(rank, allowed, uniform=block.uniform)
    return spread_blocks(chosen, w.shape, block.n, leaf.axes)


def _rank(
    scores: Float[Array, "*shape"],
    kept: Bool[chex.Array, "*shape"],
    stack: int,
    count: int,
    share: float,
) -> Float[Array, "*shape"]:
    """Scores in which survivors come first, then what was not kept, then what is dropped."""
    competing = tuple(range(stack, scores.ndim))
    lowest = jnp.full_like(scores, -jnp.inf)
    stays = count - math.floor(share * count)
    survives = kept & keep_highest(jnp.where(kept, scores, lowest), signed_keys, stays, competing)
    return jnp.where(survives, jnp.full_like(scores, jnp.inf), jnp.where(kept, lowest, scores))


def _kept_blocks(leaf: LeafPlan, block: Block1xN) -> int:
    taps = math.prod(leaf.shape[axis] for axis in leaf.tap_axes)
    return leaf.kept // (block.n * taps)


def sparse_of(
    params: chex.ArrayTree, plan: Plan, masks: Masks, lambda_w: chex.Numeric | None
) -> chex.ArrayTree:
    """Straight-through parameters under masks, with SR-STE's pull unless it is None."""

    def prune_leaf(name: str, w: jax.Array) -> jax.Array:
        pulled = w if lambda_w is None else pull_pruned(w, masks[name], lambda_w)
        return prune_ste(pulled, masks[name])

    return map_planned(prune_leaf, params, plan)


def ticket_of(params: chex.ArrayTree, plan: Plan, masks: Masks) -> chex.ArrayTree:
    """The sparse network at the end of a cycle, in float32 or wider."""

    def widen(w: Any) -> jax.Array:
        w = jnp.asarray(w)
        is_float = jnp.issubdtype(w.dtype, jnp.floating)
        return w.astype(np.promote_types(w.dtype, np.float32)) if is_float else w

    pruned = map_planned(lambda name, w: apply_mask(w, masks[name]), params, plan)
    return jax.tree.map(widen, pruned)


def check_cycles(
    plan: Plan,
    begin: int,
    every: int,
    tickets: int,
    drop: float | None,
    lambda_w: chex.Numeric | None,
) -> None:
    """Raises TypeError or ValueError unless these describe cycles."""
    check_plan(plan)
    check_steps(begin=begin)
    check_count(every=every, tickets=tickets)
    if drop is not None:
        check_number("drop", drop)
        if not 0 <= drop <= 1:
            raise ValueError(f"drop is a share of the kept weights, 0 <= drop <= 1; got {drop}")
    if lambda_w is not None:
        check_lambda(lambda_w)
