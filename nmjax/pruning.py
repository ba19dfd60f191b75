"""Applies a plan to parameters: masks, sparse parameters for training, pruned ones for export.

All three compute the masks from the weights unless masks are given. Computing a mask costs little
more than reading the weights, and within one jitted training step the forward pass and
`nmjax.add_sparse_refined` share the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.masks.platforms import on_shards
from nmjax.masks.scores import Score, magnitude
from nmjax.plans import LeafPlan, Plan, check_plan
from nmjax.ste import (
    apply_mask,
    check_has_values,
    check_lambda,
    check_mask,
    sparse_refined,
    straight_through,
)
from nmjax.trees.leaves import IsLeaf, map_named, named_leaves
from nmjax.trees.modules import check_no_module

if TYPE_CHECKING:
    import chex

Masks = Mapping[str, "chex.Array"]
Params = TypeVar("Params")


def compute_masks(params: chex.ArrayTree, plan: Plan) -> dict[str, jax.Array]:
    """Computes the masks of the planned leaves from their weights.

    Compute masks before you cast: weights cast to bfloat16 have ties, so their masks differ.

    Args:
      params: parameters that fit the plan. Leaves may have additional leading axes.
      plan: from `nmjax.make_plan`.

    Returns:
      Leaf name -> boolean array of the leaf's shape, True = kept.

    Raises:
      ValueError: a planned leaf is missing from `params` or has another shape.
    """
    leaves = planned_leaves(params, plan)
    check_leaves_have_values(leaves)
    return {name: leaf_mask(leaf, plan[name], plan.score) for name, leaf in leaves.items()}


def sparsify(
    params: Params,
    plan: Plan,
    masks: Masks | None = None,
    *,
    lambda_w: chex.Numeric | None = None,
    dtype: Any = None,
) -> Params:
    """Sparse parameters for the forward pass of training, with a straight-through gradient.

    Call it inside the function that you differentiate. The gradient with respect to a sparse weight
    reaches every dense weight, including pruned ones (STE). SR-STE also pulls the pruned weights
    toward zero: put `nmjax.add_sparse_refined` in the optimizer, or pass `lambda_w` here if you
    cannot change the optimizer. Doing both pulls twice. With loss scaling use the optimizer: the
    term of `lambda_w` is not scaled with the loss, so it shrinks when the gradients are unscaled.

    Args:
      params: dense parameters that fit the plan.
      plan: from `nmjax.make_plan`.
      masks: leaf name -> boolean array; computed from `params` by default.
      lambda_w: if given, the backward pass adds `lambda_w * ~mask * w`, as in `prune_sr_ste`.
      dtype: of the sparse weights, such as bfloat16 for products; by default that of the dense
        ones. Masks are computed before rounding, and gradients arrive in the dense weight's dtype.
        A program for TPUs prunes and rounds float32 to bfloat16 in one pass.

    Returns:
      The same tree with the same shardings, and the same dtypes unless `dtype` is given. Leaves
      outside the plan are unchanged.

    Raises:
      ValueError: `params` or `masks` do not fit the plan.
      TypeError: a mask is not boolean; `dtype` is not a real floating dtype.

    Source: STE and SR-STE as in Zhou et al., ICLR 2021.

    >>> import jax.numpy as jnp
    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> nmjax.sparsify(params, plan)["kernel"].ravel().tolist()
    [4.0, 3.0, 0.0, 0.0]
    """
    if lambda_w is not None:
        check_lambda(lambda_w)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a real floating dtype, such as bfloat16; got {dtype!r}")
    rule = straight_through if lambda_w is None else partial(sparse_refined, lambda_w)
    return _apply_plan(rule, params, plan, masks, None if dtype is None else jnp.dtype(dtype))


def prune(params: Params, plan: Plan, masks: Masks | None = None) -> Params:
    """Sparse parameters for evaluation and export; pruned weights get no gradient.

    After training with a `nmjax.Sparsifier`, use its `export`, which knows the masks of training.

    Prune before you cast: weights cast to bfloat16 have ties, so their masks differ from those of
    training.

    Args, Returns, and Raises are those of `sparsify`.
    """
    return _apply_plan(lambda prune_one, *leaf: prune_one(*leaf), params, plan, masks)


def leaf_mask(w: jax.Array, leaf: LeafPlan, score: Score) -> jax.Array:
    """The mask of one weight under its part of the plan."""
    return _keep(jax.lax.stop_gradient(w), leaf, score, np.dtype(bool))


def prune_leaf(
    w: jax.Array, leaf: LeafPlan, score: Score, dtype: np.dtype | None = None
) -> jax.Array:
    """One weight under its part of the plan, with zeros where its mask is False.

    With `dtype`, what is kept is rounded to it, in the same pass where that is possible.
    """
    return _keep(w, leaf, score, w.dtype if dtype is None else dtype)


@dataclass(frozen=True)
class _Keep:
    """What a plan does with a weight, as a function that can be hashed."""

    leaf: LeafPlan
    score: Score

    def __call__(self, w: jax.Array, *, out: np.dtype) -> jax.Array:
        """The mask if `out` is bool, else the values in this dtype."""
        pattern = self.leaf.pattern
        if out == np.bool_:
            return pattern.mask(w, self.leaf.axes, self.score)
        if out == w.dtype:
            return pattern.prune(w, self.leaf.axes, self.score)
        return pattern.prune_to(out, w, self.leaf.axes, self.score)


def _keep(w: jax.Array, leaf: LeafPlan, score: Score, out: np.dtype) -> jax.Array:
    keep = _Keep(leaf, score)
    # Other scores may look at the whole weight. Where a mesh axis is not automatic, the weight's
    # type says how it lies.
    if leaf.sharding is None or score is not magnitude or not _is_automatic(w):
        return keep(w, out=out)
    axes = [axis for span in leaf.pattern.runs_along(leaf.axes) for axis in span]
    return on_shards(keep, w, leaf.sharding, axes, out=out)


def _is_automatic(w: Any) -> bool:
    mesh = jax.typeof(w).sharding.mesh
    return not mesh.manual_axes and not mesh.explicit_axes


def planned_leaves(
    params: chex.ArrayTree, plan: Plan, *, is_hidden: IsLeaf | None = None
) -> dict[str, jax.Array]:
    """The leaves of `params` that the plan names, after checking that they fit it.

    Args:
      params: parameters that fit the plan.
      plan: from `nmjax.make_plan`.
      is_hidden: recognizes nodes that hide a leaf or subtree, such as `optax.MaskedNode`; planned
        leaves below them are left out.

    Raises:
      ValueError: a planned leaf is missing or has another shape; the error lists all such leaves.
      TypeError: `plan` is not a plan; `params` is a Flax module; a planned leaf does not have a
        real floating dtype (the error lists all of them).
    """
    if isinstance(params, Plan) and not isinstance(plan, Plan):
        raise TypeError(
            f"expected parameters and then a plan, got a plan and then {type(plan).__name__}; swap "
            "the two arguments"
        )
    check_plan(plan)
    check_no_module(params)
    leaves = named_leaves(params, is_leaf=is_hidden)
    hidden = [name for name, leaf in leaves.items() if is_hidden is not None and is_hidden(leaf)]
    visible = [name for name in plan if not any(is_below(name, node) for node in hidden)]
    found = {name: leaves[name] for name in visible if name in leaves}
    strange = {n: x for n, x in found.items() if not hasattr(x, "shape") or not hasattr(x, "dtype")}
    if strange:
        raise TypeError(
            "planned leaves must be arrays, but "
            + ", ".join(f"{name} is of type {type(x).__name__}" for name, x in strange.items())
        )
    # Collect every complaint before raising, so that one error shows all that is wrong.
    complaints = [
        f"  {name}: planned as {plan[name].shape}, "
        + (f"got {leaves[name].shape}" if name in leaves else _describe_missing(name, leaves))
        for name in visible
        if name not in leaves or not fits(leaves[name].shape, plan[name])
    ]
    if complaints:
        raise ValueError(
            "the parameters do not fit the plan:\n"
            + "\n".join(complaints)
            + "\n"
            + _way_out(visible, leaves)
        )
    wrong = [name for name in visible if not jnp.issubdtype(leaves[name].dtype, jnp.floating)]
    if wrong:
        raise TypeError(
            "only weights with a real floating dtype can be sparse, but "
            + ", ".join(f"{name} has dtype {leaves[name].dtype}" for name in wrong)
        )
    return {name: leaves[name] for name in visible}


def _way_out(planned: list[str], leaves: Mapping[str, Any]) -> str:
    for key in ("params", "model"):
        if all(f"{key}/{name}" in leaves for name in planned):
            return f"The plan is for the tree below {key!r}: pass params[{key!r}]."
        if all(name.removeprefix(f"{key}/") in leaves for name in planned):
            return f"The plan is for a tree with {key!r} at the top: pass {{{key!r}: params}}."
    return (
        "Make the plan from these parameters, or pass the tree that it was made from (not "
        "flattened)."
    )


def _describe_missing(name: str, leaves: Mapping[str, Any]) -> str:
    if any(is_below(leaf, name) for leaf in leaves):
        return "got a subtree; if it is a packed weight, call nmjax.unpack first"
    return "not in the tree"


def is_below(name: str, node: str) -> bool:
    """Whether a leaf is the node of that name, or in its subtree."""
    return node in ("", name) or name.startswith(f"{node}/")


def fits(shape: tuple[int, ...], leaf: LeafPlan) -> bool:
    """Whether the shape is the planned one, possibly with additional leading axes."""
    # Leading axes come from `nn.scan` or from a `vmap` over seeds.
    return shape[max(len(shape) - len(leaf.shape), 0) :] == leaf.shape


def check_leaves_have_values(leaves: Mapping[str, Any]) -> None:
    """Raises TypeError if a leaf is a ShapeDtypeStruct."""
    for name, leaf in leaves.items():
        check_has_values(leaf, name)


def check_masks(masks: Masks, leaves: Mapping[str, jax.Array]) -> None:
    """Raises ValueError or TypeError unless every leaf has a mask that fits, and no other has."""
    check_are_masks(masks)
    check_are_masks(leaves)
    missing, extra = leaves.keys() - masks.keys(), masks.keys() - leaves.keys()
    if missing or extra:
        raise ValueError(
            "the keys of the masks must be exactly the planned leaves; "
            f"missing: {_listed(missing)}, not planned: {_listed(extra)}"
        )
    for name, leaf in leaves.items():
        check_mask(leaf, masks[name], name)


def check_are_masks(masks: Any) -> None:
    """Raises TypeError unless `masks` is a flat mapping; parameters are an easy mistake."""
    got = f"got {type(masks).__name__}"
    if isinstance(masks, Mapping) and not isinstance(masks, Plan):
        nested = [repr(name) for name, mask in masks.items() if isinstance(mask, Mapping)]
        if not nested:
            return
        got = f"got a tree below {', '.join(nested)}"
    raise TypeError(
        "masks map the name of a leaf to a boolean array, as nmjax.compute_masks(params, plan) "
        f"returns them; {got}"
    )


def _keeps_range(dtype: np.dtype, to: np.dtype) -> bool:
    """Whether what is not zero stays so when it is rounded from one dtype to another."""
    # SR-STE's backward pass takes zeros for pruned weights. It flushes denormals in any case.
    return bool(jnp.finfo(to).tiny <= jnp.finfo(dtype).tiny)


def _listed(names: Collection[Any]) -> list[str] | str:
    return sorted(map(str, names)) or "none"


def _apply_plan(
    prune_with: Callable[..., jax.Array],
    params: Params,
    plan: Plan,
    masks: Masks | None,
    dtype: np.dtype | None = None,
) -> Params:
    """Replaces planned leaves with `prune_with(prune, leaf)` or `prune_with(prune, leaf, mask)`."""
    leaves = planned_leaves(params, plan)
    check_leaves_have_values(leaves)
    if masks is not None:
        check_masks(masks, leaves)

    def pruned(name: str, leaf: jax.Array) -> jax.Array:
        to = leaf.dtype if dtype is None else dtype
        if masks is None:
            prune_to = to if _keeps_range(leaf.dtype, to) else leaf.dtype
            prune_one = partial(prune_leaf, leaf=plan[name], score=plan.score, dtype=prune_to)
            return prune_with(prune_one, leaf).astype(to)
        return prune_with(apply_mask, leaf, masks[name]).astype(to)

    return map_named(lambda name, leaf: pruned(name, leaf) if name in leaves else leaf, params)
