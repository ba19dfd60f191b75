"""ADMM with a mask that becomes sparse step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve

from nmjax.masks.arguments import check_positive
from nmjax.masks.ranking import keep_highest, signed_keys
from nmjax.plans import Plan
from nmjax.post_training.solving import Params, Structure, normalized, solved
from nmjax.post_training.statistics import Statistics

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


def admm(
    params: Params,
    plan: Plan,
    statistics: Statistics,
    *,
    ridge: float = 0.1,
    rho: float = 1.0,
    steps: int = 20,
    pruning_steps: int = 15,
) -> Params:
    """Minimizes the error of the output over the weights and, gradually, the mask.

    With inputs scaled to norm 1, K = G + ridge I, and V = W, U = 0 at the start, each step does

        Z = (V + U) mask,    U <- U + V - Z,    V <- (K + rho I)^-1 (K W + rho (Z - U))

    In step t of the first T pruning steps, the mask keeps the best of each group of |V + U|, and of
    all others the largest, so that a fraction s (1 - (1 - t / T)^3) of the weights is dropped with
    the pattern's sparsity s. Then it stays. One factorization serves all steps.

    Args:
      params: parameters that fit the plan.
      plan: from `nmjax.make_plan`. A 1xN block is ranked by the sum of (V + U)^2.
      statistics: Gram matrices from `collect(..., kind="gram")`.
      ridge: relative to the mean of the scaled Gram's diagonal.
      rho: weight of the constraint.
      steps: of ADMM.
      pruning_steps: steps after which the mask stays; at most `steps`.

    Returns:
      The same tree, pruned; leaves outside the plan are unchanged.

    Raises:
      ValueError: a leaf has no Gram matrix, or it does not fit the leaf; not 1 <= pruning_steps <=
        steps; rho is not above 0.

    Source: Boza, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024.
    """
    if not 1 <= pruning_steps <= steps:
        raise ValueError(f"pruning_steps lie between 1 and steps={steps}, got {pruning_steps}")
    check_positive("rho", rho)
    return solved(
        params,
        plan,
        _solve,
        statistics=statistics,
        ridge=ridge,
        rho=rho,
        steps=steps,
        pruning_steps=pruning_steps,
    )


def _solve(
    w: Array,
    gram: Array,
    structure: Structure,
    *,
    ridge: float,
    rho: float,
    steps: int,
    pruning_steps: int,
) -> Array:
    k, scale = normalized(gram, ridge)
    w = w * scale
    factor = cho_factor(k + rho * jnp.eye(len(k), dtype=k.dtype))
    target = k @ w

    def step(t: Any, state: Any) -> Any:
        v, u, mask = state
        keep = _mask_in_step(v + u, (t + 1) / pruning_steps, structure)
        mask = jnp.where(t < pruning_steps, keep, mask)
        z = jnp.where(mask, v + u, 0)
        u = u + v - z
        return cho_solve(factor, target + rho * (z - u)), u, mask

    start = (w, jnp.zeros_like(w), jnp.ones(w.shape, bool))
    v, u, mask = lax.fori_loop(0, steps, step, start)
    return jnp.where(mask, v + u, 0) / scale


def _mask_in_step(
    z: Float[Array, "in out"], share: Any, structure: Structure
) -> Bool[Array, "in out"]:
    """The pattern's mask, and of the other weights the largest that may stay in this step."""
    mask = structure.keep(z**2)
    dropped = (mask.size - jnp.sum(mask)).astype(z.dtype)
    extra = jnp.round(dropped * jnp.clip(1 - share, 0).astype(z.dtype) ** 3).astype(jnp.int32)
    return mask | keep_highest(jnp.where(mask, -1, jnp.abs(z)), signed_keys, extra, (0, 1))
