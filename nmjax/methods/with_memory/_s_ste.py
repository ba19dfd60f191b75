"""S-STE: a soft threshold instead of a cut, with a scale that is frozen at the start."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.masks.nm import nm_mask
from nmjax.methods.groups import check_nm, cut, highest_dropped
from nmjax.methods.sparsifier import Sparsifier, map_planned, masks_of
from nmjax.packed.packing import check_pattern
from nmjax.patterns import NM, LeafPlan
from nmjax.plans import Plan, check_plan
from nmjax.pruning import leaf_mask, planned_leaves
from nmjax.ste import replace_ste

if TYPE_CHECKING:
    import chex
    from jax.typing import ArrayLike


class SSteState(NamedTuple):
    """State of `s_ste`.

    Attributes:
      scales: leaf name -> float32 scalar, frozen since `init`.
    """

    scales: Mapping[str, jax.Array]


def s_ste(plan: Plan) -> Sparsifier:
    """Shrinks kept weights by the largest dropped one, so that the forward pass is continuous.

    A hard mask jumps when a kept and a dropped weight change places; here both are zero at that
    moment. With t the largest magnitude that a group drops, the forward pass computes

        beta * sign(w) * max(|w| - t, 0),      beta = <W, S> / <S, S>,   S = sign(W) max(|W| - t, 0)

    and the gradient passes straight through, not multiplied by beta. The scale beta of each leaf
    comes from the weights given to `init` and stays: scales that follow the weights make training
    unstable. Use the dense recipe, without SR-STE's pull. The groups of weights that tie at t keep
    fewer than N.

    For Gaussian weights beta is 1.48 at 2:4, 1.89 at 1:4, 2.49 at 1:8 and 3.13 at 1:16. Beyond 1:4
    so much of a kept weight is lost that the constructor warns. The authors tried 1:2 and 2:4.

    Args:
      plan: from `nmjax.make_plan`, with N:M patterns.

    Returns:
      A sparsifier with state `SSteState`. What it exports is the scaled, shrunk weights.

    Raises:
      TypeError: `plan` is not a plan.
      ValueError: a leaf has another kind of pattern.

    Warns:
      UserWarning: a pattern keeps less than a quarter of the weights.

    Source: Hu et al., "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training",
    NeurIPS 2024, and `sparse/utils.py` of huyz2023/2by4-pretrain. The products of gradients in 8
    bits, and their own sparsity, are not part of it here.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[5.0], [-4.0], [2.0], [1.0]])}
    >>> sparsifier = s_ste(nmjax.make_plan(params, "2:4"))
    >>> state = sparsifier.init(params, jax.random.key(0))
    >>> f"{state.scales['kernel']:.4f}"  # (5 * 3 + 4 * 2) / (3 * 3 + 2 * 2)
    '1.7692'
    >>> [f"{w:.2f}" for w in sparsifier.apply(params, state)["kernel"].ravel()]
    ['5.31', '-3.54', '0.00', '0.00']
    """
    check_plan(plan)
    check_nm(plan, "s_ste")
    steep = {name: leaf.pattern for name, leaf in plan.items() if leaf.pattern.density < 0.25}
    if steep:
        listed = ", ".join(f"{name} ({pattern})" for name, pattern in steep.items())
        warnings.warn(
            "the scale of S-STE is large where fewer than a quarter of the weights are kept, and "
            f"training may diverge: {listed}. nmjax.methods.s_ste_scale computes it",
            stacklevel=2,
        )

    def init(params: chex.ArrayTree, key: chex.PRNGKey) -> SSteState:
        del key
        leaves = planned_leaves(params, plan)
        return SSteState({n: _scale(w, _shrink(plan, n, w)) for n, w in leaves.items()})

    def refresh(state: SSteState, params: chex.ArrayTree, step: chex.Numeric) -> SSteState:
        del params, step
        return state

    def apply(params: chex.ArrayTree, state: SSteState) -> chex.ArrayTree:
        scales = masks_of(state, SSteState, "scales")

        def soften(name: str, w: jax.Array) -> jax.Array:
            shrunk = _shrink(plan, name, lax.stop_gradient(w))
            return replace_ste(w, jnp.asarray(scales[name]).astype(w.dtype) * shrunk)

        return map_planned(soften, params, plan)

    def export(params: chex.ArrayTree, state: SSteState) -> chex.ArrayTree:
        sparse = apply(params, state)
        check_pattern(sparse, plan, "These weights are not sparse")
        return sparse

    return Sparsifier(init, refresh, apply, export)


def s_ste_scale(w: ArrayLike, n: int, m: int, axis: int = -2) -> jax.Array:
    """The scale of S-STE for a weight: `<W, S> / <S, S>`, the least-squares fit of S to W.

    Args:
      w: weights, real floating dtype.
      n: how many of each group are kept.
      m: group size; divides the size of `axis`.
      axis: axis along which groups extend.

    Returns:
      A scalar, float32 or wider.

    Raises:
      TypeError: as from `nmjax.nm_mask`.
      ValueError: as from `nmjax.nm_mask`.

    >>> f"{s_ste_scale(jnp.array([[5.0], [-4.0], [2.0], [1.0]]), 2, 4):.4f}"
    '1.7692'
    """
    array = jnp.asarray(w)
    leaf = LeafPlan(NM(n, m), (axis % array.ndim - array.ndim,), (), array.shape)
    return _scale(array, _soft_threshold(array, nm_mask(array, n, m, axis), leaf))


def _shrink(plan: Plan, name: str, w: jax.Array) -> jax.Array:
    return _soft_threshold(w, leaf_mask(w, plan[name], plan.score), plan[name])


def _soft_threshold(w: jax.Array, mask: jax.Array, leaf: LeafPlan) -> jax.Array:
    groups, whole = cut(w, leaf)
    kept = cut(mask, leaf).weights
    threshold = highest_dropped(groups, kept)
    # A selection, so that what is dropped becomes 0 and not -0. A NaN that is kept stays visible.
    shrunk = groups - jnp.sign(groups) * threshold
    return whole(jnp.where(kept & ~(jnp.abs(groups) <= threshold), shrunk, 0))


def _scale(w: jax.Array, shrunk: jax.Array) -> jax.Array:
    dtype = np.promote_types(w.dtype, np.float32)
    dot = partial(jnp.sum, dtype=dtype)
    w, shrunk = w.astype(dtype), shrunk.astype(dtype)
    norm = dot(shrunk**2)
    # A weight of zeros, or of ties only, has nothing to scale.
    return jnp.where(norm > 0, dot(w * shrunk) / jnp.where(norm > 0, norm, 1), 1)
