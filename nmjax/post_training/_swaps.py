"""Swaps within groups that lower the error of the output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.patterns.nm import NM
from nmjax.plans import Plan
from nmjax.post_training.solving import Params, Structure, by_leaf, grouped_order
from nmjax.post_training.statistics import Statistics
from nmjax.pruning import Masks

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


def improve_by_swaps(
    params: Params,
    plan: Plan,
    statistics: Statistics,
    masks: Masks,
    *,
    steps: int | None = None,
) -> dict[str, jax.Array]:
    """Swaps kept for dropped weights of the same group while that lowers the error of the output.

    The error of one output, whose kept weights stay as they are, is d^T G d with d = w where the
    weight is dropped. With c = G d, keeping u in place of p changes it by

        -2 w_u c_u + w_u^2 G_uu + 2 w_p c_p + w_p^2 G_pp - 2 w_u w_p G_up

    Each step carries out the best swap of each output, until no swap of any output gains. Follow it
    with `least_squares`.

    Args:
      params: parameters before pruning, which fit the plan.
      plan: from `nmjax.make_plan`, with N:M patterns only: 1xN blocks have no groups.
      statistics: Gram matrices from `collect(..., kind="gram")`.
      masks: leaf name -> boolean array of the leaf's shape, True = kept, such as those of `wanda`.
      steps: swaps of each output, at most; by default as many as there are inputs.

    Returns:
      The masks after the swaps, by name. Each group keeps as many weights as before.

    Raises:
      ValueError: a pattern is not N:M; a leaf has no Gram matrix, or it does not fit the leaf;
        masks are missing.

    Source: the formula follows from the error; the idea of swaps is that of Zimmer et al.,
    "SparseSwaps", 2025.
    """
    others = [f"{name} ({leaf.pattern})" for name, leaf in plan.items() if not _is_nm(leaf.pattern)]
    if others:
        raise ValueError(
            f"swaps need groups, as N:M patterns have them, but there are {', '.join(others)}"
        )
    most: dict[str, Any] = {} if steps is None else {"steps": steps}
    return by_leaf(params, plan, _solve, statistics=statistics, masks=masks, **most)


def _solve(
    w: Array, gram: Array, mask: Array, structure: Structure, *, steps: int | None = None
) -> Array:
    pattern: Any = structure.pattern
    order = grouped_order(pattern, len(w))
    limit = len(w) if steps is None else steps
    swapped = _swapped(w[order], gram[order][:, order], mask[order], pattern.m, limit)
    return jnp.zeros_like(mask).at[order].set(swapped)


def _is_nm(pattern: Any) -> bool:
    return isinstance(pattern, NM)


def _swapped(
    w: Float[Array, "in out"],
    gram: Float[Array, "in in"],
    mask: Bool[Array, "in out"],
    m: int,
    limit: int,
) -> Bool[Array, "in out"]:
    outputs = jnp.arange(w.shape[1])
    within = gram.reshape(len(w) // m, m, len(w) // m, m)
    within = jnp.moveaxis(jnp.diagonal(within, axis1=0, axis2=2), -1, 0)  # (groups, m, m)
    own = w**2 * jnp.diagonal(gram)[:, None]
    # Below this, a gain is rounding, and swaps could go in circles.
    least = 1e-6 * jnp.maximum(jnp.sum(w * (gram @ w), axis=0), 0)

    def step(state: Any) -> Any:
        mask, c, number, _ = state
        grouped = [x.reshape(-1, m, w.shape[1]) for x in (w, w * c, own, mask)]
        values, products, squares, kept = grouped
        enter = jnp.where(kept, jnp.inf, squares - 2 * products)
        leave = jnp.where(kept, squares + 2 * products, jnp.inf)
        cross = within[..., None] * values[:, :, None] * values[:, None]
        change = enter[:, :, None] + leave[:, None] - 2 * cross  # (groups, u, p, out)
        flat = change.reshape(-1, w.shape[1])
        best = jnp.argmin(flat, axis=0)
        gains = flat[best, outputs] < -least
        group, rest = jnp.divmod(best, m * m)
        u, p = group * m + rest // m, group * m + rest % m
        mask = mask.at[u, outputs].set(mask[u, outputs] | gains)
        mask = mask.at[p, outputs].set(mask[p, outputs] & ~gains)
        delta = gram[:, p] * w[p, outputs][None] - gram[:, u] * w[u, outputs][None]
        return mask, c + jnp.where(gains[None], delta, 0), number + 1, gains.any()

    start = (mask, gram @ jnp.where(mask, 0, w), jnp.array(0), jnp.array(True))
    found: jax.Array = lax.while_loop(lambda s: s[3] & (s[2] < limit), step, start)[0]
    return found
