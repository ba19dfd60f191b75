"""Methods of sparse training as triples of pure functions.

A training loop calls `init` once, `refresh` between steps (once an epoch is enough for every method
here) and `apply` inside the loss. Methods differ in what their state remembers: those whose mask
follows from the weights remember nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from nmjax.plans import Plan
from nmjax.pruning import Masks, check_masks, compute_masks, planned_leaves, prune, sparsify

Params = Any
State = Any


class Sparsifier(NamedTuple):
    """What turns dense parameters into the sparse ones of the forward pass.

    Attributes:
      init: `(params, key) -> state`, a pytree of arrays.
      refresh: `(state, params, step) -> state`, jit-able, of the same structure, shapes and
        dtypes. `step` counts optimizer steps and may be traced.
      apply: `(params, state) -> params`, sparse, with the method's gradient rule.
    """

    init: Callable[[Params, jax.Array], State]
    refresh: Callable[[State, Params, ArrayLike], State]
    apply: Callable[[Params, State], Params]


class OneShotState(NamedTuple):
    """State of `one_shot`.

    Attributes:
      masks: leaf name -> boolean array; all True until the mask is taken.
      taken: boolean scalar, whether it has been taken.
    """

    masks: Mapping[str, jax.Array]
    taken: jax.Array


def dense() -> Sparsifier:
    """Leaves the parameters as they are: the baseline, in the same training loop."""
    return _stateless(lambda params: params)


def straight_through(plan: Plan, *, lambda_w: ArrayLike | None = None) -> Sparsifier:
    """Masks recomputed from the weights at every step, with a straight-through gradient.

    Args:
      plan: from `nmjax.make_plan`.
      lambda_w: None for STE, and for SR-STE with `nmjax.add_sparse_refined` in the optimizer;
        a number for SR-STE in the backward pass.

    Source: STE and SR-STE, Zhou et al., ICLR 2021.
    """
    return _stateless(lambda params: sparsify(params, plan, lambda_w=lambda_w))


def one_shot(plan: Plan, *, at_step: int = 0, masks: Masks | None = None) -> Sparsifier:
    """A mask taken once and kept for good; pruned weights get no gradient.

    With `at_step=0` the mask is taken from the parameters given to `init`: prune a trained
    network, then fine-tune it (ASP). With a later `at_step` the forward pass is dense until the
    first `refresh` at or after that step. With `masks` the topology is the caller's, for example
    that of a network trained with SR-STE.

    Args:
      plan: from `nmjax.make_plan`.
      at_step: optimizer step from which on the network is pruned.
      masks: leaf name -> boolean array for every planned leaf; True = kept.

    Raises:
      ValueError: `at_step` is negative, or given along with `masks`; from `init`, masks that do
        not fit the parameters.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (ASP).
    """
    if at_step < 0:
        raise ValueError(f"at_step counts optimizer steps from 0, got {at_step}")
    if masks is not None and at_step:
        raise ValueError(f"masks hold from the first step; drop them, or at_step={at_step}")

    def init(params: Params, key: jax.Array) -> OneShotState:
        del key
        leaves = planned_leaves(params, plan)
        everything = {name: jnp.ones_like(leaf, dtype=bool) for name, leaf in leaves.items()}
        if masks is not None:
            check_masks(masks, leaves)
            # `&` places the caller's masks, which may come from a file, where the weights are.
            given = {name: everything[name] & masks[name] for name in leaves}
            return OneShotState(given, jnp.array(True))
        if at_step == 0:
            return OneShotState(compute_masks(params, plan), jnp.array(True))
        return OneShotState(everything, jnp.array(False))

    def refresh(state: OneShotState, params: Params, step: ArrayLike) -> OneShotState:
        if at_step == 0:
            return state
        return jax.lax.cond(
            ~state.taken & (jnp.asarray(step) >= at_step),
            lambda: OneShotState(compute_masks(params, plan), jnp.array(True)),
            lambda: state,
        )

    def apply(params: Params, state: OneShotState) -> Params:
        return prune(params, plan, state.masks)

    return Sparsifier(init, refresh, apply)


def _stateless(apply: Callable[[Params], Params]) -> Sparsifier:
    """A sparsifier that remembers nothing."""
    return Sparsifier(
        init=lambda params, key: (),
        refresh=lambda state, params, step: state,
        apply=lambda params, state: apply(params),
    )
