"""Bi-Mask: a second mask, N:M along the outputs, for the gradient of the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.masks.nm import nm_mask
from nmjax.methods.groups import check_nm
from nmjax.methods.sparsifier import Sparsifier, check_count, check_step, is_due, masks_of
from nmjax.patterns import NM, LeafPlan
from nmjax.plans import Plan, check_plan
from nmjax.pruning import leaf_mask, planned_leaves, prune, sparsify
from nmjax.ste import apply_mask, check_lambda
from nmjax.trees.leaves import map_named

if TYPE_CHECKING:
    import chex
    from jaxtyping import Array, Bool, Int32, Shaped

# The state holds raw key data, which every checkpoint format can store.
_GENERATOR = "threefry2x32"


class BiMaskState(NamedTuple):
    """State of `bi_mask`.

    Attributes:
      orders: leaf name -> int32 array, (*stack, outputs): the outputs in the order in which groups
        of the backward mask run over them.
      key: uint32 (2,), data of the random key that all searches derive theirs from.
      step: int32 scalar, the optimizer step of the last `refresh`.
    """

    orders: Mapping[str, jax.Array]
    key: jax.Array
    step: jax.Array


def bi_mask(
    plan: Plan,
    *,
    lambda_w: chex.Numeric | None = 2e-4,
    refresh_every: int = 100,
    tries: int = 100,
) -> Sparsifier:
    """SR-STE with a second mask, which makes the gradient of the input an N:M product too.

    The forward pass multiplies by `w * E` with the N:M mask E, whose groups run along the inputs.
    The gradient of the input sums over outputs, where E has no pattern. It is computed with

        w * B,   B = E * (N:M mask of |w * E| with groups along the outputs, in an order p)

    from `backward_weights(params, plan, state)`, in products that can multiply by one weight
    forward and by another backward: `training_matmul`. In other products training is SR-STE's. The
    gradient of the weight is dense, plus `lambda_w * ~E * w`.

    Of `tries` random orders p, the one with which B keeps most is taken. The search runs once every
    `refresh_every` steps; E and B follow the weights in every step. It forgets the order of before,
    as the released code does.

    Args:
      plan: from `nmjax.make_plan`, with N:M patterns of consecutive groups; M divides the outputs.
      lambda_w: strength of the pull on weights that E drops; None for none.
      refresh_every: steps from one search to the next.
      tries: random orders in each search.

    Returns:
      A sparsifier with state `BiMaskState`. Gathers outputs, which communicates between devices
      that hold different ones.

    Raises:
      TypeError: `plan` is not a plan; a number of steps or tries is not an integer.
      ValueError: a leaf has another kind of pattern, or M does not divide its outputs; a number is
        not positive; `lambda_w` is not finite.

    Source: Zhang et al., "Bi-directional Masks for Efficient N:M Sparse Training", ICML 2023, and
    `CnnModels/utils/conv_type.py` of zyxxmu/Bi-Mask. There, groups of convolutions run over inputs
    and taps together, as with `NM(..., flatten="kernel")`, and random orders come from NumPy. The
    code stops the search for evaluation; here `apply` never searches.

    >>> import nmjax
    >>> w = jnp.array([[4.0, 3, 2, 1], [1, 2, 3, 4], [3, 1, 1, 1], [2, 4, 4, 2]])
    >>> plan = nmjax.make_plan({"kernel": w}, "2:4")
    >>> sparsifier = bi_mask(plan, tries=4)
    >>> state = sparsifier.init({"kernel": w}, jax.random.key(0))
    >>> sparsifier.apply({"kernel": w}, state)["kernel"][0].tolist()
    [4.0, 3.0, 0.0, 0.0]
    >>> backward = backward_weights({"kernel": w}, plan, state)["kernel"]
    >>> (backward != 0).sum(axis=1).tolist()  # at most two of every four outputs
    [2, 2, 1, 2]
    """
    check_plan(plan)
    check_nm(plan, "bi_mask")
    check_count(refresh_every=refresh_every, tries=tries)
    if lambda_w is not None:
        check_lambda(lambda_w)
    _check_outputs(plan)

    def search(params: chex.ArrayTree, data: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl=_GENERATOR), step)
        leaves = planned_leaves(params, plan)
        keys = jax.random.split(key, len(leaves))
        return {
            name: _best_order(_kept(w, plan, name), plan[name], key, tries)
            for (name, w), key in zip(leaves.items(), keys, strict=True)
        }

    def init(params: chex.ArrayTree, key: chex.PRNGKey) -> BiMaskState:
        # The caller's key may belong to another generator; random bits of it seed ours.
        data, step = jax.random.bits(key, (2,), jnp.uint32), jnp.zeros([], jnp.int32)
        return BiMaskState(search(params, data, step), data, step)

    def refresh(state: BiMaskState, params: chex.ArrayTree, step: chex.Numeric) -> BiMaskState:
        check_step(step)
        old = _orders(state)
        step = jnp.asarray(step, jnp.int32)
        orders = lax.cond(
            is_due(step, state.step, refresh_every),
            lambda: search(params, state.key, step),
            lambda: dict(old),
        )
        return BiMaskState(orders, state.key, step)

    def apply(params: chex.ArrayTree, state: BiMaskState) -> chex.ArrayTree:
        _orders(state)
        return sparsify(params, plan, lambda_w=lambda_w)

    return Sparsifier(init, refresh, apply, lambda params, state: prune(params, plan))


def backward_weights(params: chex.ArrayTree, plan: Plan, state: BiMaskState) -> chex.ArrayTree:
    """The weights w * B of `bi_mask`, for the gradients of inputs.

    Args:
      params: dense parameters that fit the plan.
      plan: of the method.
      state: of the method.

    Returns:
      A tree like `params`. Planned leaves are N:M along the outputs in the order of the state, and
      a part of the sparse weights of the forward pass; no gradient flows through them.
    """
    orders = _orders(state)
    planned_leaves(params, plan)

    def backward(name: str, w: jax.Array) -> jax.Array:
        if name not in plan:
            return w
        return lax.stop_gradient(apply_mask(w, _backward_mask(w, plan, name, orders[name])))

    return map_named(backward, params)


def _backward_mask(w: jax.Array, plan: Plan, name: str, order: jax.Array) -> jax.Array:
    leaf = plan[name]
    pattern = cast(NM, leaf.pattern)
    kept = _kept(w, plan, name)
    # Dropped weights rank below those that are kept and zero.
    size = jnp.where(kept, jnp.abs(w), jnp.full_like(w, -1))
    ordered = _take(_outputs_last(size, leaf), order)
    mask = nm_mask(ordered, pattern.n, pattern.m, -1, score=lambda scores: scores)
    mask = _take(mask, jnp.argsort(order, axis=-1).astype(jnp.int32))
    return kept & _outputs_back(mask, w, leaf)


def _best_order(
    kept: Bool[Array, "*shape"], leaf: LeafPlan, key: chex.PRNGKey, tries: int
) -> Int32[Array, "*stack outputs"]:
    """Of random orders of the outputs, the one whose backward mask keeps most."""
    pattern = cast(NM, leaf.pattern)
    flat = _outputs_last(kept, leaf)
    shape = (*flat.shape[:-2], flat.shape[-1])

    def draw(i: chex.Numeric) -> Int32[Array, "*stack outputs"]:
        noise = jax.random.uniform(jax.random.fold_in(key, i), shape)
        return jnp.argsort(noise, axis=-1).astype(jnp.int32)

    def survivors(order: Int32[Array, "*stack outputs"]) -> Int32[Array, "*stack"]:
        ordered = _take(flat, order)
        groups = ordered.reshape(*ordered.shape[:-1], shape[-1] // pattern.m, pattern.m)
        # How many entries a group keeps does not depend on which are largest.
        counts = jnp.minimum(jnp.sum(groups, axis=-1, dtype=jnp.int32), pattern.n)
        return jnp.sum(counts, axis=(-2, -1), dtype=jnp.int32)

    def compare(i: chex.Numeric, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        order, most = best
        other = draw(i)
        count = survivors(other)
        return jnp.where((count > most)[..., None], other, order), jnp.maximum(count, most)

    first = draw(0)
    return lax.fori_loop(1, tries, compare, (first, survivors(first)))[0]


def _kept(w: jax.Array, plan: Plan, name: str) -> Bool[Array, "*shape"]:
    return leaf_mask(lax.stop_gradient(w), plan[name], plan.score)


def _outputs_last(w: Shaped[Array, "*shape"], leaf: LeafPlan) -> jax.Array:
    """(*stack, others, outputs)."""
    moved = w.transpose(_order_of_axes(w, leaf))
    stack = w.shape[: w.ndim - len(leaf.shape)]
    return moved.reshape(*stack, -1, leaf.outputs)


def _outputs_back(flat: jax.Array, w: jax.Array, leaf: LeafPlan) -> jax.Array:
    order = _order_of_axes(w, leaf)
    back = [order.index(axis) for axis in range(w.ndim)]
    return flat.reshape([w.shape[axis] for axis in order]).transpose(back)


def _order_of_axes(w: jax.Array, leaf: LeafPlan) -> list[int]:
    outputs = [axis % w.ndim for axis in leaf.output_axes]
    return [*(axis for axis in range(w.ndim) if axis not in outputs), *outputs]


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
    """(*stack, others, outputs), with the outputs in an order of its own for each of the stack."""
    return jnp.take_along_axis(x, order[..., None, :], axis=-1)


def _orders(state: BiMaskState) -> Mapping[str, jax.Array]:
    return masks_of(state, BiMaskState, "orders")


def _check_outputs(plan: Plan) -> None:
    wrong = []
    for name, leaf in plan.items():
        pattern = cast(NM, leaf.pattern)
        pattern.check_consecutive("bi_mask")
        if leaf.outputs % pattern.m:
            wrong.append(f"  {name} {leaf.shape}: {pattern}, {leaf.outputs} outputs")
    if wrong:
        raise ValueError(
            "bi_mask needs groups of M outputs, which do not fit these leaves:\n"
            + "\n".join(wrong)
            + "\nList them in exclude= of make_plan, or give them another pattern in rules=."
        )
