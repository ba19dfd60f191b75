"""MaxQ: a ramp of dense groups, and a soft mask that weighs the kept weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.masks.arguments import check_number
from nmjax.masks.ranking import keep_highest, magnitude_keys, signed_keys
from nmjax.masks.scores import score_weights
from nmjax.methods.groups import check_nm, cut
from nmjax.methods.schedules import Ramp
from nmjax.methods.sparsifier import Sparsifier, map_planned, scheduled
from nmjax.patterns import NM, LeafPlan
from nmjax.plans import Plan, check_plan
from nmjax.pruning import leaf_mask
from nmjax.ste import apply_mask, check_lambda, pull_pruned, replace_ste

if TYPE_CHECKING:
    import chex

# The weights of a group that a ramp on N keeps must not depend on rounding in float32.
_ROUNDING = 1e-5


def max_q(
    plan: Plan,
    ramp: Ramp | None,
    *,
    ramp_on: Literal["groups", "n"] = "groups",
    dense_longest: Literal["smallest", "largest"] = "smallest",
    soft: bool = True,
    temperature: float = 0.01,
    lambda_w: chex.Numeric | None = None,
) -> Sparsifier:
    """Makes the groups sparse one after the other, and weighs the kept weights by a soft mask.

    Groups become sparse over the ramp: `floor(groups * (1 - ramp(step)))` of them, those with the
    smallest L1 norm, are still dense. The forward pass computes

        w * m,   m = E * (1 + f + k)

    with E = 1 for the N largest weights of a sparse group and all of a dense one. f is a weight's
    place in its output filter: `sigmoid((|w| - t) / temperature)` for the N/M largest of the
    filter, else 0; t lies halfway between the smallest of these and the next. k is the same among
    all weights at one tap, for convolutions with several taps only. The gradient passes straight
    through, not multiplied by m. Masks are recomputed from the weights in every forward pass.

    The ramp alone is `soft=False`; the soft mask alone is `ramp=None`.

    Args:
      plan: from `nmjax.make_plan`, with N:M patterns.
      ramp: optimizer step -> fraction of the groups that are sparse, from `nmjax.methods`;
        published: `linear_ramp(0, end)` with `end` after a quarter of the training. None for all
        from the start. Call `refresh` before every step, or once per epoch.
      ramp_on: `"groups"` as above, `"n"` to let all groups drop `floor((M - N) * ramp(step))` of
        their weights, a variant in the released code.
      dense_longest: `"smallest"` as published, or `"largest"`, an ablation in the released code.
      soft: whether f and k count.
      temperature: of the sigmoid, in the unit of the weights.
      lambda_w: strength of SR-STE's pull on the weights where E = 0, in the backward pass; the
        authors use 2e-4. None for none.

    Returns:
      A sparsifier with state `Clock`. What it exports is w * m, multiplied out. The ranking of the
      groups, and of a filter along a sharded reduction axis, communicates between devices.

    Raises:
      TypeError: `plan` is not a plan; `ramp` is not a function; a number is not one.
      ValueError: a leaf has another kind of pattern; `ramp_on` or `dense_longest` is unknown;
        `temperature` is not positive; neither ramp nor soft mask is left.

    Source: Xiang et al., "MaxQ: Multi-Axis Query for N:M Sparsity Network", CVPR 2024, and
    `models/conv_type/mullt_axis_query_v2_pro.py` of JingyangXiang/MaxQ. Evaluation there uses the
    mask of the last training step; here it uses that of the weights.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> sparsifier = max_q(nmjax.make_plan(params, "2:4"), None, temperature=1.0)
    >>> state = sparsifier.init(params, jax.random.key(0))
    >>> factor = sparsifier.apply(params, state)["kernel"] / params["kernel"]
    >>> [f"{x:.2f}" for x in factor.ravel().tolist()]  # 1 + sigmoid(1.5), 1 + sigmoid(0.5)
    ['1.82', '1.62', '0.00', '0.00']
    """
    _check_arguments(plan, ramp, ramp_on, dense_longest, soft, temperature, lambda_w)

    def kept(name: str, w: jax.Array, step: jax.Array) -> jax.Array:
        mask = leaf_mask(w, plan[name], plan.score)
        if ramp is None:
            return mask
        if ramp_on == "n":
            return _keep_more(w, plan, name, ramp(step))
        return mask | _dense_groups(w, plan[name], ramp, step, dense_longest)

    def forward(params: chex.ArrayTree, step: jax.Array) -> chex.ArrayTree:
        def soften(name: str, w: jax.Array) -> jax.Array:
            fixed = lax.stop_gradient(w)
            mask = kept(name, fixed, step)
            factor = 1 + _soft_mask(fixed, plan[name], temperature) if soft else 1
            value = apply_mask(fixed * factor, mask)
            return replace_ste(w if lambda_w is None else pull_pruned(w, mask, lambda_w), value)

        return map_planned(soften, params, plan)

    return scheduled(forward, plan, 0 if ramp is None else getattr(ramp, "end", "the ramp's end"))


def _dense_groups(
    w: jax.Array, leaf: LeafPlan, ramp: Ramp, step: jax.Array, dense_longest: str
) -> jax.Array:
    """True in the groups that are still dense."""
    groups, whole = cut(w, leaf)
    size = jnp.sum(jnp.abs(groups).astype(np.promote_types(w.dtype, np.float32)), axis=-1)
    # Axes in front of the planned ones hold a stack of weights, each with its own ranking.
    axes = tuple(range(w.ndim - len(leaf.shape), size.ndim))
    total = math.prod(size.shape[axis] for axis in axes)
    # A share that is a whole number of groups must not fall below it by rounding.
    left = 1 - ramp(step) + jnp.finfo(jnp.float32).eps
    count = jnp.minimum(jnp.floor(total * left).astype(jnp.int32), total)
    rank = -size if dense_longest == "smallest" else size
    dense = keep_highest(rank, signed_keys, count, axes)
    return whole(jnp.broadcast_to(dense[..., None], groups.shape))


def _keep_more(w: jax.Array, plan: Plan, name: str, fraction: jax.Array) -> jax.Array:
    """The mask with floor((M - N) * fraction) weights of each group dropped."""
    n, m = (pattern := cast(NM, plan[name].pattern)).n, pattern.m
    dropped = jnp.floor((m - n) * fraction + _ROUNDING).astype(jnp.int32)
    groups, whole = cut(score_weights(w, plan.score), plan[name])
    return whole(keep_highest(groups, signed_keys, m - dropped, groups.ndim - 1))


def _soft_mask(w: jax.Array, leaf: LeafPlan, temperature: float) -> jax.Array:
    """F + k, in [0, 2]."""
    filters = tuple(axis % w.ndim for axis in (*leaf.reduction_axes, *leaf.tap_axes))
    soft = _query(w, leaf, filters, temperature)
    if math.prod(leaf.shape[axis] for axis in leaf.tap_axes) > 1:
        taps = tuple(axis % w.ndim for axis in (*leaf.reduction_axes, *leaf.output_axes))
        soft = soft + _query(w, leaf, taps, temperature)
    return soft


def _query(w: jax.Array, leaf: LeafPlan, axes: tuple[int, ...], temperature: float) -> jax.Array:
    """sigmoid((|w| - t) / temperature) for the N/M largest along these axes, else 0."""
    pattern = cast(NM, leaf.pattern)
    n = math.prod(w.shape[axis] for axis in axes) * pattern.n // pattern.m
    kept = keep_highest(w, magnitude_keys, n, axes)
    size = jnp.abs(w)
    lowest = jnp.min(jnp.where(kept, size, jnp.inf), axis=axes, keepdims=True)
    highest = jnp.max(jnp.where(kept, 0, size), axis=axes, keepdims=True)
    threshold = (lowest + highest) / 2
    return jnp.where(kept, jax.nn.sigmoid((size - threshold) / temperature), 0)


def _check_arguments(
    plan: Plan,
    ramp: Ramp | None,
    ramp_on: str,
    dense_longest: str,
    soft: bool,
    temperature: float,
    lambda_w: chex.Numeric | None,
) -> None:
    check_plan(plan)
    check_nm(plan, "max_q")
    if ramp is not None and not callable(ramp):
        raise TypeError(
            "ramp must be a function of the step, such as nmjax.linear_ramp(begin, end), or None; "
            f"got {type(ramp).__name__}"
        )
    if ramp_on not in ("groups", "n"):
        raise ValueError(f'ramp_on must be "groups" or "n", got {ramp_on!r}')
    if dense_longest not in ("smallest", "largest"):
        raise ValueError(f'dense_longest must be "smallest" or "largest", got {dense_longest!r}')
    if not isinstance(soft, bool):
        raise TypeError(f"soft must be True or False, got {soft!r}")
    if ramp is None and not soft:
        raise ValueError("without a ramp and without the soft mask nothing is left but STE")
    check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if lambda_w is not None:
        check_lambda(lambda_w)
