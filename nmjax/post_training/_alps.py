"""ALPS: a splitting whose penalty grows while the mask still moves, then least squares on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.masks.arguments import check_positive
from nmjax.plans import Plan
from nmjax.post_training._least_squares import fitted
from nmjax.post_training.solving import Params, Structure, damped, normalized, solved
from nmjax.post_training.statistics import Statistics

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

# The mask is compared with that of three steps before.
_CHECK_EVERY = 3
# Relative to the given rho. Weights that have the pattern already keep their mask under any rho,
# and a fifth of it again and again would end at zero.
_SMALLEST_RHO = 1e-6


def alps(
    params: Params,
    plan: Plan,
    statistics: Statistics,
    *,
    ridge: float = 0.01,
    rho: float = 0.1,
    steps: int = 300,
) -> Params:
    """Searches for the mask and the weights together, by an operator splitting.

    With inputs scaled to norm 1, K = G + ridge I, P the projection on the pattern, and B = W, V = 0
    at the start, each step does

        D = P(B + V / rho),    V <- V + rho (B - D),    B <- (K + rho I)^-1 (K W - V + rho D)

    Every third step, rho grows by 1.3, 1.2 or 1.1 if more than a tenth, more than 0.5 %, or any of
    the kept weights have changed places. If none has, the search ends; if rho never grew, it was
    too large, and the search starts again with a fifth of it. Then the weights are the best ones
    on the mask, as in `least_squares`. One eigendecomposition serves all steps.

    Args:
      params: parameters that fit the plan.
      plan: from `nmjax.make_plan`. A 1xN block is ranked by its sum of squares, which makes P the
        projection for blocks too.
      statistics: Gram matrices from `collect(..., kind="gram")`.
      ridge: relative to the mean of the Gram's diagonal.
      rho: weight of the constraint at the start.
      steps: at most.

    Returns:
      The same tree, pruned; leaves outside the plan are unchanged.

    Raises:
      ValueError: a leaf has no Gram matrix, or it does not fit the leaf; rho is not above 0.

    Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
    Language Models", NeurIPS 2024, algorithm 1. The last step is exact in place of projected
    conjugate gradients, and all is in float32 in place of float64.
    """
    check_positive("rho", rho)
    return solved(params, plan, _solve, statistics=statistics, ridge=ridge, rho=rho, steps=steps)


def _solve(
    w: Array, gram: Array, structure: Structure, *, ridge: float, rho: float, steps: int
) -> Array:
    mask = _searched(w, gram, structure, ridge, rho, steps)
    return fitted(w, damped(gram, ridge), mask, structure)


class _Search(NamedTuple):
    b: jax.Array
    v: jax.Array
    mask: jax.Array
    checked: jax.Array  # the mask at the last check
    rho: jax.Array
    first_rho: jax.Array  # at the last start
    step: jax.Array
    is_done: jax.Array


def _searched(
    w: Float[Array, "in out"],
    gram: Float[Array, "in in"],
    structure: Structure,
    ridge: float,
    rho: float,
    steps: int,
) -> Bool[Array, "in out"]:
    k, scale = normalized(gram, ridge)
    w = w * scale
    values, vectors = jnp.linalg.eigh(k)
    rotated = values[:, None] * (vectors.T @ w)

    def advance(s: _Search) -> _Search:
        moved = s.b + s.v / s.rho
        mask = structure.keep(moved**2)
        d = jnp.where(mask, moved, 0)
        v = s.v + s.rho * (s.b - d)
        right = rotated + vectors.T @ (s.rho * d - v)
        b = vectors @ (right / (values + s.rho)[:, None])
        s = s._replace(b=b, v=v, mask=mask, step=s.step + 1)
        return lax.cond(s.step % _CHECK_EVERY == 0, check, lambda s: s, s)

    def check(s: _Search) -> _Search:
        share = jnp.sum(s.mask != s.checked) / jnp.sum(s.mask)
        growth = jnp.where(share > 0.1, 1.3, jnp.where(share > 0.005, 1.2, 1.1))
        stands_still = share == 0
        may_shrink = s.first_rho > _SMALLEST_RHO * rho
        is_too_large = stands_still & (s.rho == s.first_rho) & may_shrink
        after = s._replace(
            checked=s.mask,
            rho=jnp.where(stands_still, s.rho, s.rho * growth.astype(s.rho.dtype)),
            is_done=stands_still & ~is_too_large,
        )
        again = begin(s.first_rho / 5, s.step)
        return jax.tree.map(lambda a, b: jnp.where(is_too_large, a, b), again, after)

    def begin(rho: Any, step: Any) -> _Search:
        mask = structure.keep(w**2)
        return _Search(w, jnp.zeros_like(w), mask, mask, rho, rho, step, jnp.array(False))

    start = begin(jnp.array(rho, w.dtype), jnp.array(0))
    return lax.while_loop(lambda s: (s.step < steps) & ~s.is_done, advance, start).mask
