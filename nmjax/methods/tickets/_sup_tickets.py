"""Sup-tickets: the average of sparse networks found along one run, pruned to the pattern."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.methods.sparsifier import Sparsifier, check_step, masks_of
from nmjax.methods.tickets.cycles import (
    check_cycles,
    cycle_at,
    first_masks,
    next_masks,
    sparse_of,
    ticket_of,
)
from nmjax.packed.packing import check_pattern
from nmjax.plans import Plan
from nmjax.pruning import Masks, compute_masks, planned_leaves
from nmjax.ste import replace_ste

if TYPE_CHECKING:
    import chex


class SupTicketsState(NamedTuple):
    """State of `sup_tickets`.

    Attributes:
      masks: leaf name -> boolean array; after the last cycle, those of the average.
      average: of the tickets so far, like the parameters, in float32 or wider; zeros before.
      taken: int32 scalar, how many tickets it holds.
      cycle: int32 scalar: 0 before the first cycle, then 1, 2, ..., and `tickets + 1` at the end.
    """

    masks: Mapping[str, jax.Array]
    average: chex.ArrayTree
    taken: jax.Array
    cycle: jax.Array


def sup_tickets(
    plan: Plan,
    begin: int,
    every: int,
    tickets: int,
    *,
    drop: float | None = 0.5,
    weighting: Literal["cumulative", "halving"] = "cumulative",
    lambda_w: chex.Numeric | None = None,
) -> Sparsifier:
    """Averages sparse networks that short cycles at the end of training find.

    Until step `begin`, masks follow the weights (STE, or SR-STE with a pull). Then come cycles of
    `every` steps with fixed masks. Each begins with new ones: the lowest share `drop` of each
    leaf's kept weights is dropped, and the highest of the others in the same group takes the
    place; blocks likewise in their row. Each ends with a ticket, the masked network W * E, and

        average = (1 - 1/(k+1)) average + 1/(k+1) (W * E)     after cycle k = 0, 1, ...

    After the last cycle the forward pass, and what is exported, is the average pruned to the
    pattern; all other leaves are averages too. Compute batch statistics again for it. Cycles need a
    learning rate that rises and falls: `ticket_rate`.

    `drop=None` lets the masks follow the weights to the end. That is STE or SR-STE with the same
    averaging, the control for this method.

    Args:
      plan: from `nmjax.make_plan`, with N:M or 1xN patterns.
      begin: step of the first cycle; published: after 90% of the training.
      every: steps of a cycle; published: 8 epochs on CIFAR, 2 on ImageNet.
      tickets: number of cycles.
      drop: share of the kept weights that a cycle drops, published 0.5; None as above.
      weighting: `"cumulative"` as above, or `"halving"`, also published: the newest ticket counts
        as much as all before it.
      lambda_w: strength of SR-STE's pull on weights that the mask drops; None for none.

    Returns:
      A sparsifier with state `SupTicketsState`. Call `refresh` before every step, and once more
      after the last, with the step `begin + tickets * every`. Export raises before that. Choosing
      what to drop communicates between devices.

    Raises:
      TypeError: `plan` is not a plan; a number of steps is not an integer; another number is none.
      ValueError: a number is out of range; `weighting` is unknown.

    Source: Yin et al., "Superposing Many Tickets into One: A Performance Booster for Sparse Neural
    Network Training", UAI 2022, and its code. There sparsity is unstructured, regrown weights have
    the largest gradients and start at zero, and dropped ones are not trained. Here dropped weights
    keep their values and get the straight-through gradient, so the highest of them is one whose
    gradients have added up.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> sparsifier = sup_tickets(nmjax.make_plan(params, "2:4"), 0, 10, 2)
    >>> state = sparsifier.init(params, jax.random.key(0))
    >>> for step in (0, 10, 20):
    ...     state = sparsifier.refresh(state, params, step)
    ...     print(sparsifier.apply(params, state)["kernel"].ravel().tolist())
    [4.0, 0.0, 2.0, 0.0]
    [4.0, 3.0, 0.0, 0.0]
    [4.0, 1.5, 0.0, 0.0]
    """
    check_cycles(plan, begin, every, tickets, drop, lambda_w)
    if weighting not in ("cumulative", "halving"):
        raise ValueError(f'weighting must be "cumulative" or "halving", got {weighting!r}')
    at = partial(cycle_at, begin=begin, every=every, tickets=tickets)

    def init(params: chex.ArrayTree, key: chex.PRNGKey) -> SupTicketsState:
        del key
        masks = first_masks(params, plan, begin, drop)
        average = jax.tree.map(jnp.zeros_like, ticket_of(params, plan, masks))
        return SupTicketsState(masks, average, jnp.zeros([], jnp.int32), at(0))

    def refresh(
        state: SupTicketsState, params: chex.ArrayTree, step: chex.Numeric
    ) -> SupTicketsState:
        check_step(step)
        masks, now = masks_of(state, SupTicketsState), at(step)
        ends = (now > state.cycle) & (jnp.asarray(state.cycle) > 0)
        last = compute_masks(params, plan) if drop is None else masks
        average = _include(state, ticket_of(params, plan, last), ends, weighting)
        new = next_masks(params, plan, masks, jnp.asarray(state.cycle), now, tickets, drop)
        new = lax.cond(
            ends & (now > tickets), lambda: _masks_of_average(average, plan), lambda: new
        )
        return SupTicketsState(new, average, jnp.asarray(state.taken) + ends.astype(jnp.int32), now)

    def apply(params: chex.ArrayTree, state: SupTicketsState) -> chex.ArrayTree:
        masks = masks_of(state, SupTicketsState)
        done = jnp.asarray(state.cycle) > tickets
        sparse = sparse_of(params, plan, masks, lambda_w)
        final = ticket_of(state.average, plan, masks)
        return jax.tree.map(lambda w, value: _replace_if(done, w, value), sparse, final)

    def export(params: chex.ArrayTree, state: SupTicketsState) -> chex.ArrayTree:
        planned_leaves(params, plan)
        masks_of(state, SupTicketsState)
        if not int(state.taken) or int(state.cycle) <= tickets:
            raise ValueError(
                f"sup_tickets averages {tickets} tickets and has {int(state.taken)}: the last one "
                f"ends in the refresh at step {begin + tickets * every}"
            )
        sparse = apply(params, state)
        check_pattern(sparse, plan, "the average is pruned to the pattern, but its weights are not")
        return sparse

    return Sparsifier(init, refresh, apply, export)


def _include(
    state: SupTicketsState, ticket: chex.ArrayTree, ends: jax.Array, weighting: str
) -> chex.ArrayTree:
    """The average with one more ticket, if a cycle ends."""
    taken = jnp.asarray(state.taken)
    weight = 1 / (1 + taken) if weighting == "cumulative" else jnp.where(taken == 0, 1.0, 0.5)

    def include(old: Any, new: jax.Array) -> jax.Array:
        old = jnp.asarray(old)
        mixed = old + (new - old) * weight.astype(new.dtype)
        return jnp.where(ends, mixed.astype(old.dtype), old)

    return jax.tree.map(include, state.average, ticket)


def _masks_of_average(average: chex.ArrayTree, plan: Plan) -> Masks:
    return compute_masks(average, plan)


def _replace_if(done: jax.Array, w: jax.Array, value: jax.Array) -> jax.Array:
    return replace_ste(w, jnp.where(done, value.astype(w.dtype), lax.stop_gradient(w)))
