"""Packed parameters: what a plan prunes, stored as kept values and where they were.

A packed tree is the parameter tree with a packed weight, such as `PackedNM`, in place of each
planned leaf, inside its box if it had one. Packed weights are pytree nodes, so the packed tree goes
through `jax.jit`, `jax.tree.map`, `jax.device_put` and checkpoints like any other.
"""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nmjax.packed.bits import is_nonzero
from nmjax.packed.weight import Packed, is_packed
from nmjax.plans import LeafPlan, Plan, check_plan
from nmjax.pruning import (
    Masks,
    check_leaves_have_values,
    check_masks,
    compute_masks,
    planned_leaves,
)
from nmjax.ste import check_has_values
from nmjax.trees.leaves import map_named, named_leaves


def pack(params: Any, plan: Plan, masks: Masks | None = None) -> Any:
    """Packs sparse weights exactly: `unpack(pack(p, plan)) == p`, for any score of the plan.

    Pack the weights that the network was trained and evaluated with:

    - `pack(sparsifier.export(params, state), plan)` after training with a `nmjax.Sparsifier`,
    - `pack(prune(params, plan), plan)` after training with `nmjax.sparsify`,
    - `pack(params, plan, masks)` for dense parameters and the masks they were trained with.

    Prune before you cast: weights cast to bfloat16 have ties, so their masks differ from those of
    training.

    Weights that are not sparse are an error, because packing them would drop weights that the
    network uses. The values are unknown inside `jax.jit`, `jax.vmap` and `jax.shard_map`. Sparse
    weights are packed exactly there, too. Groups or rows that are not sparse cannot raise there:
    they keep the weights that the plan's score ranks highest.

    Outside `jax.jit`, every bit of a kept weight is copied. Inside, XLA's CPU compiler may quiet
    signaling NaNs and flush denormal bfloat16 numbers, as it does whenever it copies them.
    `pack` has no gradient; `unpack` has one, to the kept values.

    It warns if the plan leaves most weights dense only because their axes are unknown.

    Args:
      params: pruned parameters that fit the plan, or dense ones with `masks`. Leaves may have more
        axes in front than planned.
      plan: from `nmjax.make_plan`.
      masks: leaf name -> boolean array, True = kept. By default, the nonzero weights are kept;
        NaN is not zero.

    Returns:
      The same tree with a `PackedNM` or `PackedBlocks` for each planned leaf; others untouched.

    Raises:
      ValueError: without masks, the weights are not sparse (the error lists all such leaves); a
        planned leaf is already packed; `params` or `masks` do not fit the plan; a mask keeps more
        than its pattern does. (Values of traced masks are unknown, so inside `jax.jit` groups or
        rows that keep too many become NaN instead.)
      TypeError: a mask is not boolean; a leaf is a `jax.ShapeDtypeStruct`; a weight's dtype does
        not fill whole bytes.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [-5.0], [1.0]])}
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> packed = pack(nmjax.prune(params, plan), plan)
    >>> packed["kernel"].values.ravel().tolist(), packed["kernel"].positions().ravel().tolist()
    ([4.0, -5.0], [0, 2])
    >>> unpack(packed)["kernel"].ravel().tolist()
    [4.0, 0.0, -5.0, 0.0]
    """
    check_plan(plan)
    if plan.warning:
        warnings.warn(plan.warning, stacklevel=2)
    already = [n for n, x in named_leaves(params, is_leaf=is_packed).items() if is_packed(x)]
    if plan.keys() & already:
        raise ValueError(
            f"packed already: {', '.join(name for name in already if name in plan)}; nmjax.unpack "
            "makes them dense again"
        )
    leaves = planned_leaves(params, plan)
    shapes = [n for n, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
    if shapes:
        raise TypeError(
            f"shapes without values cannot be packed: {', '.join(shapes)}; for the shapes of the "
            "packed weights, call jax.eval_shape(lambda params: nmjax.pack(params, plan), params)"
        )
    if masks is None:
        ranked = compute_masks(params, plan)
        nonzero = {n: is_nonzero(jnp.asarray(leaf)) for n, leaf in leaves.items()}
        masks = {n: _keep_nonzero(nonzero[n], ranked[n], plan[n]) for n in leaves}
        _check_nothing_is_dropped(leaves, nonzero, masks)
    else:
        check_masks(masks, leaves)
        # Values of traced masks are unknown; what keeps too many becomes NaN.
        visible = {n: mask for n, mask in masks.items() if not isinstance(mask, jax.core.Tracer)}
        # Inside `jax.jit`, operations on visible masks would be traced, too.
        with jax.ensure_compile_time_eval():
            check_misfits(visible, plan, "the masks keep more than the plan does")
    return map_named(
        lambda name, leaf: _pack_leaf(leaf, masks[name], plan[name]) if name in masks else leaf,
        params,
    )


def unpack(packed: Any) -> Any:
    """Returns dense parameters with zeros: the inverse of `pack` on pruned parameters.

    Args:
      packed: a tree with packed leaves; other leaves are returned unchanged.

    Raises:
      TypeError: a packed leaf holds ShapeDtypeStructs.
    """

    def unpack_leaf(name: str, leaf: Any) -> Any:
        if not is_packed(leaf):
            return leaf
        check_has_values(leaf.values, name or "the packed weight")
        return leaf.unpack()

    return map_named(unpack_leaf, packed, is_leaf=is_packed)


def check_sparse(params: Any, plan: Plan) -> None:
    """Raises ValueError unless the weights are as sparse as the plan says.

    Only zeros count, so it does not matter how the parameters were pruned. It looks at the values,
    so it cannot run inside `jax.jit`.

    Args:
      params: parameters that fit the plan.
      plan: from `nmjax.make_plan`.

    Raises:
      ValueError: a leaf has groups that keep too many weights (all such leaves are named, with
        counts); `params` do not fit the plan.
      TypeError: inside `jax.jit`.
    """
    check_pattern(params, plan, "these weights are not sparse yet; call nmjax.prune first")


def check_pattern(params: Any, plan: Plan, complaint: str) -> None:
    """`check_sparse` with another complaint in front of the list of leaves."""
    leaves = planned_leaves(params, plan)
    check_leaves_have_values(leaves)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves.values()):
        raise TypeError(
            "whether weights are sparse depends on their values, which are unknown inside jax.jit "
            "and other transformations; check or export them outside"
        )
    nonzero = {name: is_nonzero(jnp.asarray(leaf)) for name, leaf in leaves.items()}
    check_misfits(nonzero, plan, complaint)


def _pack_leaf(w: jax.Array, mask: jax.Array, leaf_plan: LeafPlan) -> Packed:
    # How the dense weight lies on a mesh says nothing of the packed arrays, and is not in files.
    leaf_plan = dataclasses.replace(leaf_plan, sharding=None)
    return Packed.kind_for(leaf_plan.pattern).pack(jnp.asarray(w), jnp.asarray(mask), leaf_plan)


@partial(jax.jit, static_argnames="leaf_plan", inline=True)
def _keep_nonzero(nonzero: jax.Array, mask: jax.Array, leaf_plan: LeafPlan) -> jax.Array:
    """The plan's mask, but the nonzero weights where they fit: its score may prefer zeros."""
    return Packed.kind_for(leaf_plan.pattern).cover(nonzero, mask, leaf_plan)


def _check_nothing_is_dropped(leaves: Masks, nonzero: Masks, masks: Masks) -> None:
    """Raises ValueError if the masks drop nonzero weights whose values are known."""
    dropped = {
        name: _count_dropped(nonzero[name], masks[name])
        for name, leaf in leaves.items()
        if not isinstance(leaf, jax.core.Tracer) and not isinstance(masks[name], jax.core.Tracer)
    }
    # One transfer for all leaves, after every count has been started.
    counts = {name: int(count) for name, count in jax.device_get(dropped).items()}
    if any(counts.values()):
        raise ValueError(
            "these weights are not sparse, and packing them would drop weights that the network "
            "uses:\n"
            + "\n".join(
                f"  {name} {leaves[name].shape}: {count:,} of {leaves[name].size:,} weights would "
                "be dropped"
                for name, count in counts.items()
                if count
            )
            + "\nPass the sparse weights of training: sparsifier.export(params, state), or "
            "nmjax.prune(params, plan) if the masks follow the weights, as with nmjax.sparsify. Or "
            "pass the masks of training in masks=."
        )


@jax.jit
def _count_dropped(nonzero: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(nonzero & ~mask, dtype=jnp.int32)


def check_misfits(kept: Masks, plan: Plan, complaint: str) -> None:
    """Raises ValueError with a complaint and a list if masks keep more than the plan does."""
    misfits = {name: describe_misfits(jnp.asarray(mask), plan[name]) for name, mask in kept.items()}
    if any(misfits.values()):
        raise ValueError(
            f"{complaint}:\n"
            + "\n".join(
                f"  {name} {kept[name].shape}: {text}" for name, text in misfits.items() if text
            )
        )


def describe_misfits(kept: jax.Array, leaf_plan: LeafPlan) -> str:
    """What is wrong with a weight that keeps these entries; empty if nothing is."""
    kind = Packed.kind_for(leaf_plan.pattern)
    wrong, of = kind.misfits(kept, leaf_plan)
    return f"{wrong:,} of {of:,} {kind.excess} {leaf_plan.pattern}" if wrong else ""
