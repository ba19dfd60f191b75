"""Masks that are sparse both ways, refreshed now and then, with a decay of what they drop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.masks.transposable import transposable_mask
from nmjax.methods.groups import check_nm
from nmjax.methods.sparsifier import (
    Method,
    Sparsifier,
    check_count,
    check_step,
    check_steps,
    export_masked,
    is_due,
    map_planned,
    masks_of,
)
from nmjax.patterns import NM
from nmjax.plans import Plan, check_plan
from nmjax.pruning import planned_leaves
from nmjax.ste import check_lambda, prune_ste
from nmjax.transforms import add_sparse_refined

if TYPE_CHECKING:
    import chex


class Hu2024State(NamedTuple):
    """State of the sparsifier of `hu_2024`.

    Attributes:
      masks: leaf name -> boolean array, N:M along both axes of the matrix.
      step: int32 scalar, the optimizer step of the last `refresh`.
    """

    masks: Mapping[str, jax.Array]
    step: jax.Array


def hu_2024(
    plan: Plan,
    *,
    refresh_every: int = 40,
    lambda_w: float = 6e-5,
    dense_from: int | None = None,
) -> Method:
    """Trains with masks that are N:M along both axes, and decays what they drop.

    A transposable mask makes the forward product and the gradient of the input sparse products.
    Masks, from `nmjax.transposable_mask`, stay for `refresh_every` steps, because finding them
    costs more than `nm_mask`. With mask E, the weights get

        g + lambda_w * ~E * w

    before Adam, so that the decay is normalized with the gradient and pruned weights flip less. The
    transformation is `nmjax.add_sparse_refined`: put it after clipping and before Adam, and pass it
    `masks=state.masks`. At the end the authors train dense.

    Args:
      plan: from `nmjax.make_plan`, with N:M patterns; M divides both sides of each matrix.
      refresh_every: steps from one mask to the next.
      lambda_w: strength of the decay; published: 6e-5 for GPT-2 with 124M and 774M parameters, 2e-4
        with 350M and 1558M.
      dense_from: step from which the network is dense and nothing decays; published: after 5/6 of
        the training. None keeps it sparse, so that it can be exported.

    Returns:
      A sparsifier with state `Hu2024State`, and a transformation. Export raises from `dense_from`
      on.

    Raises:
      TypeError: `plan` is not a plan; a number of steps is not an integer.
      ValueError: a leaf has another kind of pattern, or sides that M does not divide; a number of
        steps is not positive; `lambda_w` is not finite.

    Source: Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024, and
    `v1/nanoGPT` of its code. Sparse gradients of the output are not part of it here.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0, 3, 2, 1], [3, 4, 1, 2], [9, 9, 1, 1], [9, 9, 1, 1]])}
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> sparsifier, decay, _ = hu_2024(plan)
    >>> state = sparsifier.init(params, jax.random.key(0))
    >>> sparsifier.apply(params, state)["kernel"].tolist()
    [[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 2.0], [9.0, 9.0, 0.0, 0.0], [9.0, 9.0, 0.0, 0.0]]
    """
    check_plan(plan)
    check_nm(plan, "hu_2024")
    check_count(refresh_every=refresh_every)
    check_lambda(lambda_w)
    if dense_from is not None:
        check_steps(dense_from=dense_from)
    _check_sides(plan)
    if dense_from is None:
        decay = add_sparse_refined(plan, lambda_w)
    else:
        decay = add_sparse_refined(plan, lambda count: jnp.where(count < dense_from, lambda_w, 0.0))
    return Method(_sparsifier(plan, refresh_every, dense_from), decay)


def _sparsifier(plan: Plan, every: int, dense_from: int | None) -> Sparsifier:
    def masks_for(params: chex.ArrayTree) -> dict[str, jax.Array]:
        return {name: _mask(plan, name, w) for name, w in planned_leaves(params, plan).items()}

    def is_dense(state: Hu2024State) -> jax.Array | bool:
        return False if dense_from is None else jnp.asarray(state.step) >= dense_from

    def init(params: chex.ArrayTree, key: chex.PRNGKey) -> Hu2024State:
        del key
        return Hu2024State(masks_for(params), jnp.zeros([], jnp.int32))

    def refresh(state: Hu2024State, params: chex.ArrayTree, step: chex.Numeric) -> Hu2024State:
        check_step(step)
        old = masks_of(state, Hu2024State)
        step = jnp.asarray(step, jnp.int32)
        due = is_due(step, state.step, every)
        masks = lax.cond(due, lambda: masks_for(params), lambda: dict(old))
        return Hu2024State(masks, step)

    def apply(params: chex.ArrayTree, state: Hu2024State) -> chex.ArrayTree:
        masks, dense = masks_of(state, Hu2024State), is_dense(state)
        return map_planned(lambda name, w: prune_ste(w, masks[name] | dense), params, plan)

    def export(params: chex.ArrayTree, state: Hu2024State) -> chex.ArrayTree:
        masks, dense = masks_of(state, Hu2024State), is_dense(state)
        return export_masked(
            params,
            plan,
            {name: mask | dense for name, mask in masks.items()},
            f"hu_2024 trains dense from step {dense_from} on; without dense_from= it stays sparse.",
        )

    return Sparsifier(init, refresh, apply, export)


def _mask(plan: Plan, name: str, w: jax.Array) -> jax.Array:
    leaf = plan[name]
    pattern = cast(NM, leaf.pattern)
    # Groups of M that divide the last of several axes never leave it.
    axes = (leaf.reduction_axes[-1], leaf.output_axes[-1])
    return transposable_mask(w, pattern.n, pattern.m, axes, score=plan.score)


def _check_sides(plan: Plan) -> None:
    """Raises ValueError unless tiles of M x M fit every leaf."""
    wrong = []
    for name, leaf in plan.items():
        pattern = cast(NM, leaf.pattern)
        pattern.check_consecutive("hu_2024")
        sides = [leaf.shape[axes[-1]] for axes in (leaf.reduction_axes, leaf.output_axes) if axes]
        if len(sides) < 2 or any(side % pattern.m for side in sides):
            wrong.append(f"  {name} {leaf.shape}: {pattern}")
    if wrong:
        raise ValueError(
            "a transposable mask needs tiles of M x M, which do not fit these leaves:\n"
            + "\n".join(wrong)
            + "\nList them in exclude= of make_plan, or give them another pattern in rules=."
        )
