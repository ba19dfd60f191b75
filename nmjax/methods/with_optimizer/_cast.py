"""CAST: dense training in which Adam drives the weights that a mask drops to zero."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from nmjax.masks.arguments import check_number
from nmjax.methods.sparsifier import (
    Method,
    Sparsifier,
    check_count,
    check_rates,
    check_step,
    is_due,
    map_planned,
    masks_of,
)
from nmjax.packed.packing import check_pattern
from nmjax.plans import Plan, check_plan
from nmjax.pruning import Masks, check_masks, compute_masks, planned_leaves
from nmjax.ste import check_lambda, prune_ste
from nmjax.transforms import NO_PARAMS
from nmjax.trees.leaves import map_named

if TYPE_CHECKING:
    import chex


class CastState(NamedTuple):
    """State of the sparsifier of `cast`.

    Attributes:
      masks: leaf name -> boolean array: the weights that are not driven to zero.
      step: int32 scalar, the optimizer step of the last `refresh`.
    """

    masks: Mapping[str, jax.Array]
    step: jax.Array


class ScaleByAdamSState(NamedTuple):
    """State of the transformation of `cast`.

    Attributes:
      count: int32 scalar, number of updates so far.
      mu: first moments, like the parameters.
      nu: second moments, of what is applied and not of the gradient.
    """

    # `count` hides tuple.count.
    count: jax.Array  # type: ignore[assignment]
    mu: chex.ArrayTree
    nu: chex.ArrayTree


def cast(
    plan: Plan,
    steps: int,
    *,
    lambda_w: float = 4e-7,
    refresh_every: int = 10,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Method:
    """Trains dense, with an Adam that replaces the gradient of dropped weights by a pull to zero.

    There is no straight-through gradient and so none of its noise: the forward pass is dense until
    the end, when the dropped weights are near zero and are cut off. With alpha = t / steps, for
    update t = 1, 2, ..., AdamS computes

        m = b1 m + (1 - b1) g
        u = m for kept weights,  (1 - alpha) m + alpha lambda sign(w) for dropped ones
        v = b2 v + (1 - b2) u^2                     the square of u, not of the gradient
        update = u / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    The transformation takes the place of `optax.scale_by_adam`; pass it `masks=state.masks`. Once
    the pull dominates, a dropped weight moves by about the learning rate, whatever lambda is. So
    the sum of learning rate times alpha must exceed the weights, and the rate must end near 0, or
    dropped weights keep jumping across zero. Keep weights in float32: bfloat16 rounds the pull
    away.

    Args:
      plan: from `nmjax.make_plan`.
      steps: optimizer steps until the weights are cut off: the length of the training.
      lambda_w: the pull; the authors use 4e-7 for a network of 7 billion parameters.
      refresh_every: steps from one mask to the next; between them `refresh` returns the old one.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator.

    Returns:
      A sparsifier with state `CastState`, and a transformation with state `ScaleByAdamSState`.
      Export raises until `refresh` has seen a step >= `steps`. Published with it, and not here: a
      teacher, and learned scales for halves of columns.

    Raises:
      TypeError: `plan` is not a plan; a number of steps is not an integer; another number is none.
      ValueError: a number of steps is not positive; `lambda_w` is not finite; not 0 <= b1, b2 < 1.

    Source: Huang et al., "CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware
    Training for Large Language Models", 2025, algorithms 1 and 2, by way of the notes of an
    independent reproduction; no official code is public.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [0.2], [0.1]])}
    >>> sparsifier, adam_s, _ = cast(nmjax.make_plan(params, "2:4"), 8, lambda_w=0.1)
    >>> state, opt_state = sparsifier.init(params, jax.random.key(0)), adam_s.init(params)
    >>> grads = jax.tree.map(jnp.zeros_like, params)
    >>> updates, _ = adam_s.update(grads, opt_state, params, masks=state.masks)
    >>> updates["kernel"].round(1).ravel().tolist()  # u is not averaged, so early steps are long
    [0.0, 0.0, 10.0, 10.0]
    """
    check_plan(plan)
    check_count(steps=steps, refresh_every=refresh_every)
    check_lambda(lambda_w)
    check_rates(b1=b1, b2=b2)
    check_number("eps", eps)
    transformation = _scale_by_adam_s(plan, steps, lambda_w, b1, b2, eps)
    return Method(_sparsifier(plan, steps, refresh_every), transformation)


def _scale_by_adam_s(
    plan: Plan, steps: int, lambda_w: float, b1: float, b2: float, eps: float
) -> optax.GradientTransformationExtraArgs:
    def init(params: chex.ArrayTree) -> ScaleByAdamSState:
        zeros = partial(optax.tree.zeros_like, params)
        return ScaleByAdamSState(jnp.zeros([], jnp.int32), zeros(), zeros())

    def update(
        updates: chex.ArrayTree,
        state: ScaleByAdamSState,
        params: chex.ArrayTree | None = None,
        *,
        masks: Masks | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByAdamSState]:
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS)
        if masks is not None:
            check_masks(masks, planned_leaves(params, plan))
        kept = compute_masks(params, plan) if masks is None else masks
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)
        alpha = jnp.minimum(t / steps, 1)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)

        def mix(name: str, m: jax.Array, w: jax.Array) -> jax.Array:
            if name not in plan:
                return m
            wide = np.promote_types(m.dtype, np.float32)
            share, mean, sign = (x.astype(wide) for x in (alpha, m, jnp.sign(w)))
            pull = (1 - share) * mean + share * jnp.asarray(lambda_w, wide) * sign
            return jnp.where(kept[name], m, pull.astype(m.dtype))

        mixed = map_named(mix, mu, params)
        nu = optax.tree.update_moment_per_elem_norm(mixed, state.nu, b2, 2)

        def direct(u: jax.Array, v: jax.Array) -> jax.Array:
            wide = np.promote_types(u.dtype, np.float32)
            given = (u, 1 - b1**t, v, 1 - b2**t)
            mean, part, square, share = (x.astype(wide) for x in given)
            return (mean / part / (jnp.sqrt(square / share) + eps)).astype(u.dtype)

        return jax.tree.map(direct, mixed, nu), ScaleByAdamSState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _sparsifier(plan: Plan, steps: int, every: int) -> Sparsifier:
    def init(params: chex.ArrayTree, key: chex.PRNGKey) -> CastState:
        del key
        return CastState(compute_masks(params, plan), jnp.zeros([], jnp.int32))

    def refresh(state: CastState, params: chex.ArrayTree, step: chex.Numeric) -> CastState:
        check_step(step)
        old = masks_of(state, CastState)
        step = jnp.asarray(step, jnp.int32)
        # What is cut off at the end are the smallest weights then.
        due = is_due(step, state.step, every) | (step >= steps)
        masks = lax.cond(due, lambda: compute_masks(params, plan), lambda: dict(old))
        return CastState(masks, step)

    def apply(params: chex.ArrayTree, state: CastState) -> chex.ArrayTree:
        masks = masks_of(state, CastState)
        is_done = jnp.asarray(state.step) >= steps
        return map_planned(lambda name, w: prune_ste(w, masks[name] | ~is_done), params, plan)

    def export(params: chex.ArrayTree, state: CastState) -> chex.ArrayTree:
        sparse = apply(params, state)
        check_pattern(
            sparse,
            plan,
            f"cast cuts the dropped weights off in the first refresh at or after step {steps}, and "
            f"the last was at step {state.step}. These weights are not sparse yet",
        )
        return sparse

    return Sparsifier(init, refresh, apply, export)
