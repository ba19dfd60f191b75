"""FreeTickets: several sparse networks found along one run, which predict together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from nmjax.methods.sparsifier import Sparsifier, check_step, export_masked, masks_of
from nmjax.methods.tickets.cycles import (
    check_cycles,
    cycle_at,
    first_masks,
    next_masks,
    sparse_of,
    ticket_of,
)
from nmjax.plans import Plan
from nmjax.pruning import compute_masks

if TYPE_CHECKING:
    import chex


class FreeTicketsState(NamedTuple):
    """State of `free_tickets`.

    Attributes:
      masks: leaf name -> boolean array.
      tickets: like the parameters, with a leading axis over the tickets, in float32 or wider; zeros
        for those to come.
      cycle: int32 scalar: 0 before the first cycle, then 1, 2, ..., and `tickets + 1` at the end.
    """

    masks: Mapping[str, jax.Array]
    tickets: chex.ArrayTree
    cycle: jax.Array


def free_tickets(
    plan: Plan,
    begin: int,
    every: int,
    tickets: int,
    *,
    drop: float | None = 0.8,
    lambda_w: chex.Numeric | None = None,
) -> Sparsifier:
    """Collects sparse networks along one run, to average their predictions.

    Until step `begin`, masks follow the weights. Then come cycles as in `sup_tickets`: each drops
    the lowest share `drop` of the kept weights, fills their places within the groups, trains with
    these masks, and ends with a ticket W * E. The ensemble of tickets predicts

        p(y | x) = mean over tickets of softmax(logits of the ticket)

    `tickets_of(params, state)` lists the tickets, each exactly of the pattern, and `ensemble` is
    that mean. It costs as many forward passes as there are tickets.

    Args:
      plan: from `nmjax.make_plan`, with N:M or 1xN patterns.
      begin: step of the first cycle; published: after 150 of 450 epochs.
      every: steps of a cycle; published: 100 epochs.
      tickets: number of cycles; published: 3.
      drop: share of the kept weights that a cycle drops; published: 0.8. None lets the masks
        follow the weights: an ensemble of STE or SR-STE, the control.
      lambda_w: strength of SR-STE's pull on weights that the mask drops; None for none.

    Returns:
      A sparsifier with state `FreeTicketsState`, which stores all tickets. Call `refresh` before
      every step, and once more after the last, with the step `begin + tickets * every`. What is
      exported is one network, with the masks of the last cycle. Choosing what to drop communicates
      between devices.

    Raises:
      TypeError: `plan` is not a plan; a number of steps is not an integer; another number is none.
      ValueError: a number is out of range.

    Source: Liu et al., "Deep Ensembling with No Overhead for either Training or Testing: The
    All-Round Blessings of Dynamic Sparsity", ICLR 2022, and its code (EDST). What differs is as in
    `sup_tickets`.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> sparsifier = free_tickets(nmjax.make_plan(params, "2:4"), 0, 10, 2, drop=0.5)
    >>> state = sparsifier.init(params, jax.random.key(0))
    >>> for step in (0, 10, 20):
    ...     state = sparsifier.refresh(state, params, step)
    >>> [ticket["kernel"].ravel().tolist() for ticket in tickets_of(params, state)]
    [[4.0, 0.0, 2.0, 0.0], [4.0, 3.0, 0.0, 0.0]]
    """
    check_cycles(plan, begin, every, tickets, drop, lambda_w)
    at = partial(cycle_at, begin=begin, every=every, tickets=tickets)

    def init(params: chex.ArrayTree, key: chex.PRNGKey) -> FreeTicketsState:
        del key
        masks = first_masks(params, plan, begin, drop)
        one = ticket_of(params, plan, masks)
        return FreeTicketsState(masks, jax.tree.map(lambda w: _stack(w, tickets), one), at(0))

    def refresh(
        state: FreeTicketsState, params: chex.ArrayTree, step: chex.Numeric
    ) -> FreeTicketsState:
        check_step(step)
        masks, now = masks_of(state, FreeTicketsState), at(step)
        cycle = jnp.asarray(state.cycle)
        last = compute_masks(params, plan) if drop is None else masks
        # Index 0 is the ticket of cycle 1. Before the first cycle, -1 stores nothing.
        index = jnp.where(now > cycle, cycle - 1, -1)
        stored = jax.tree.map(partial(_store, index), state.tickets, ticket_of(params, plan, last))
        new = next_masks(params, plan, masks, cycle, now, tickets, drop)
        return FreeTicketsState(new, stored, now)

    def apply(params: chex.ArrayTree, state: FreeTicketsState) -> chex.ArrayTree:
        return sparse_of(params, plan, masks_of(state, FreeTicketsState), lambda_w)

    def export(params: chex.ArrayTree, state: FreeTicketsState) -> chex.ArrayTree:
        masks = masks_of(state, FreeTicketsState)
        return export_masked(params, plan, masks, "free_tickets trains with masks of the pattern.")

    return Sparsifier(init, refresh, apply, export)


def tickets_of(params: chex.ArrayTree, state: FreeTicketsState) -> list[chex.ArrayTree]:
    """The tickets in a state of `free_tickets`, each like the parameters.

    Args:
      params: of the network; they give the dtypes.
      state: after the last cycle.

    Raises:
      ValueError: a cycle has not ended.
    """
    masks_of(state, FreeTicketsState)
    count = jax.tree.leaves(state.tickets)[0].shape[0]
    if int(state.cycle) <= count:
        raise ValueError(
            f"free_tickets collects {count} tickets, and the last has not ended: refresh once more "
            "after the last step"
        )

    def ticket(i: int) -> chex.ArrayTree:
        return jax.tree.map(
            lambda w, many: jnp.asarray(many)[i].astype(w.dtype), params, state.tickets
        )

    return [ticket(i) for i in range(count)]


def ensemble(
    forward: Callable[..., jax.Array], tickets: Sequence[chex.ArrayTree], *inputs: Any
) -> jax.Array:
    """The mean of the class probabilities that several networks predict.

    Args:
      forward: `(params, *inputs) -> logits`, with classes along the last axis.
      tickets: parameters of the networks, at least one.
      *inputs: of the forward pass.

    Raises:
      ValueError: there are no tickets.

    >>> logits = [jnp.array([jnp.log(3.0), 0.0]), jnp.array([0.0, 0.0])]
    >>> [round(p, 3) for p in ensemble(lambda params: params, logits).tolist()]
    [0.625, 0.375]
    """
    if not tickets:
        raise ValueError("an ensemble needs at least one ticket")
    probabilities = [jax.nn.softmax(forward(ticket, *inputs)) for ticket in tickets]
    return jnp.mean(jnp.stack(probabilities), axis=0)


def _stack(w: jax.Array, tickets: int) -> jax.Array:
    # From the weight, so that the tickets lie where it does.
    return jnp.stack([jnp.zeros_like(w)] * tickets)


def _store(index: jax.Array, tickets: Any, ticket: jax.Array) -> jax.Array:
    tickets = jnp.asarray(tickets)
    # A selection: explicit sharding cannot follow an update at a traced index.
    place = jnp.arange(tickets.shape[0]).reshape(-1, *[1] * ticket.ndim)
    return jnp.where(place == index, ticket[None], tickets)
