"""SparseGPT: drops weights one input after the other, and lets later inputs make up for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.masks.nm import nm_mask
from nmjax.patterns.nm import NM
from nmjax.plans import Plan
from nmjax.post_training.solving import Params, Structure, damped, grouped_order, solved
from nmjax.post_training.statistics import Statistics

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

# Inputs whose updates are collected before they reach the rest of the matrix in one product.
_BLOCK = 128


def sparse_gpt(
    params: Params, plan: Plan, statistics: Statistics, *, ridge: float = 0.01
) -> Params:
    """Prunes input by input; the inputs that follow are updated to keep the output.

    With H = G + ridge mean(diag G) I and the upper triangular U with U^T U = H^-1, for each i:

        mask of the next group, at its first input: the n largest W_jo^2 / U_jj^2
        e_o = (W_io - mask_io W_io) / U_ii,    W_jo <- W_jo - U_ij e_o  for j >= i

    Args:
      params: parameters that fit the plan.
      plan: from `nmjax.make_plan`. Of 1xN patterns, whose blocks compete over all inputs, the mask
        is chosen before the first update, from W_jo^2 / (H^-1)_jj summed over each block.
      statistics: Gram matrices from `collect(..., kind="gram")`.
      ridge: relative to the mean of the Gram's diagonal.

    Returns:
      The same tree, pruned; leaves outside the plan are unchanged. Weights of dead inputs are zero.

    Raises:
      ValueError: a leaf has no Gram matrix, or it does not fit the leaf.

    Source: Frantar and Alistarh, "SparseGPT", ICML 2023, algorithm 1. Ours takes any N:M along any
    axes, and factorizes H once, from the last input to the first, in place of inverting it.
    """
    return solved(params, plan, _solve, statistics=statistics, ridge=ridge)


def _solve(w: Array, gram: Array, structure: Structure, *, ridge: float) -> Array:
    diagonal = jnp.diagonal(gram)
    # If no input lives, the data say nothing, and the magnitudes decide.
    dead = (diagonal == 0) & jnp.any(diagonal > 0)
    return _pruned(jnp.where(dead[:, None], 0, w), damped(gram, ridge), structure)


def _factor(h: Float[Array, "in in"]) -> Float[Array, "in in"]:
    """The upper triangular U with U^T U = H^-1."""
    # A Cholesky factor of H in reverse order is upper triangular, and U is its inverse.
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    identity = jnp.eye(len(h), dtype=h.dtype)
    inverse = lax.linalg.triangular_solve(lower, identity, lower=True, left_side=True)
    return inverse[::-1, ::-1]


def _pruned(
    w: Float[Array, "in out"], h: Float[Array, "in in"], structure: Structure
) -> Float[Array, "in out"]:
    pattern = structure.pattern
    if isinstance(pattern, NM):
        order, n = grouped_order(pattern, len(w)), pattern.n
        u = _factor(h[order][:, order])

        def choose(rows: Array, diagonal: Array, given: Array) -> Array:
            del given
            return nm_mask(rows**2 / diagonal[:, None] ** 2, n, len(rows), 0)

        mask = jnp.zeros(w.shape, bool)
        return jnp.zeros_like(w).at[order].set(_swept(w[order], u, pattern.m, choose, mask))
    u = _factor(h)
    mask = structure.keep(w**2 / jnp.sum(u * u, axis=0)[:, None])
    return _swept(w, u, 1, lambda rows, diagonal, given: given, mask)


def _swept(
    w: Float[Array, "in out"],
    u: Float[Array, "in in"],
    group: int,
    choose: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    mask: Bool[Array, "in out"],
) -> Float[Array, "in out"]:
    """Goes over the inputs in order, block after block.

    Args:
      w: the matrix.
      u: the factor of the inverse.
      group: inputs whose mask is chosen together.
      choose: their current weights, the diagonal of u, and their part of `mask` -> their mask.
      mask: for `choose`.
    """
    inputs = len(w)
    block = group * max(1, _BLOCK // group)
    # Inputs that do not exist fill the last block: with zero weights, they pass nothing on.
    extra = -inputs % block
    rows = ((0, extra), (0, 0))
    u = jnp.pad(u, (0, extra)) + jnp.diag(jnp.where(jnp.arange(inputs + extra) < inputs, 0, 1.0))
    w, mask = jnp.pad(w, rows), jnp.pad(mask, rows)

    def of_block(number: Any, w: jax.Array) -> jax.Array:
        start = number * block
        factor = lax.dynamic_slice_in_dim(u, start, block)
        own = lax.dynamic_slice_in_dim(factor, start, block, axis=1)
        current, given = (lax.dynamic_slice_in_dim(x, start, block) for x in (w, mask))

        def of_group(number: Any, state: Any) -> Any:
            first = number * group
            parts = (state[0], jnp.diagonal(own), given)
            kept = choose(*(lax.dynamic_slice_in_dim(x, first, group) for x in parts))

            def of_input(j: Any, state: Any) -> Any:
                current, errors = state
                i = first + j
                after = jnp.where(kept[j], current[i], 0)
                error = (current[i] - after) / own[i, i]
                current = (current - jnp.outer(own[i], error)).at[i].set(after)
                return current, errors.at[i].set(error)

            return lax.fori_loop(0, group, of_input, state)

        start_state = (current, jnp.zeros_like(current))
        current, errors = lax.fori_loop(0, block // group, of_group, start_state)
        # Rows of `factor` are zero before the block, so this reaches only what follows.
        return lax.dynamic_update_slice_in_dim(w - factor.T @ errors, current, start, axis=0)

    return lax.fori_loop(0, len(w) // block, of_block, w)[:inputs]
