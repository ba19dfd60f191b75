"""One-shot pruning: a mask that is computed once and stays fixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from nmjax.masks.arguments import is_integer
from nmjax.methods.sparsifier import Sparsifier, check_step, export_masked, masks_of
from nmjax.plans import Plan, check_plan
from nmjax.pruning import Masks, check_are_masks, check_masks, compute_masks, planned_leaves, prune

if TYPE_CHECKING:
    import chex


class OneShotState(NamedTuple):
    """State of `one_shot`.

    Attributes:
      masks: leaf name -> boolean array; all True until the network is pruned.
      taken: boolean scalar, whether the network has been pruned.
    """

    masks: Mapping[str, jax.Array]
    taken: jax.Array


def one_shot(plan: Plan, *, at_step: int = 0, masks: Masks | None = None) -> Sparsifier:
    """Prunes once and keeps the mask; pruned weights get no gradient.

    With `at_step=0` the mask comes from the parameters given to `init`: prune a trained network,
    then fine-tune it (ASP). With a later `at_step` the forward pass stays dense until the first
    `refresh` at or after that step. With `masks` you choose the topology, for example that of a
    network trained with SR-STE.

    Args:
      plan: from `nmjax.make_plan`.
      at_step: optimizer step at which the network is pruned.
      masks: leaf name -> boolean array for every planned leaf; True = kept.

    Raises:
      TypeError: `plan` is not a plan; `at_step` is not an integer; `masks` is not a mapping.
      ValueError: `at_step` is negative or comes with `masks`; from `init`, `masks` do not fit the
        parameters.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (ASP).
    """
    check_plan(plan)
    if isinstance(at_step, bool) or not is_integer(at_step):
        raise TypeError(
            f"at_step must be a Python integer, got {at_step!r} of type {type(at_step).__name__}"
        )
    if at_step < 0:
        raise ValueError(f"at_step counts optimizer steps from 0, got {at_step}")
    if masks is not None:
        check_are_masks(masks)
    if masks is not None and at_step:
        raise ValueError(
            f"given masks apply from the first step, so at_step={at_step} has no effect; drop one "
            "of the two arguments"
        )

    unfinished = (
        "The given masks= keep more than the plan does."
        if masks is not None
        else f"one_shot prunes in the first refresh at or after at_step={at_step}: call "
        "state = sparsifier.refresh(state, params, step) there, and export the state it returns."
    )

    def init(params: chex.ArrayTree, key: chex.PRNGKey) -> OneShotState:
        del key
        leaves = planned_leaves(params, plan)
        # `ones_like` gives each mask the sharding of its weight.
        all_kept = {name: jnp.ones_like(leaf, dtype=bool) for name, leaf in leaves.items()}
        if masks is not None:
            check_masks(masks, leaves)
            # `&` moves the caller's masks, which may come from a file, to where the weights are.
            given = {name: all_kept[name] & masks[name] for name in leaves}
            return OneShotState(given, jnp.array(True))
        if at_step == 0:
            return OneShotState(compute_masks(params, plan), jnp.array(True))
        return OneShotState(all_kept, jnp.array(False))

    def refresh(state: OneShotState, params: chex.ArrayTree, step: chex.Numeric) -> OneShotState:
        check_step(step)
        masks_of(state, OneShotState)
        if at_step == 0:
            return state
        # `taken` and not `step == at_step`: a loop that refreshes once per epoch may skip the step.
        return jax.lax.cond(
            ~state.taken & (jnp.asarray(step) >= at_step),
            lambda: OneShotState(compute_masks(params, plan), jnp.array(True)),
            lambda: state,
        )

    def apply(params: chex.ArrayTree, state: OneShotState) -> chex.ArrayTree:
        return prune(params, plan, masks_of(state, OneShotState))

    def export(params: chex.ArrayTree, state: OneShotState) -> chex.ArrayTree:
        return export_masked(params, plan, masks_of(state, OneShotState), unfinished)

    return Sparsifier(init, refresh, apply, export)
