"""The best weights on a fixed mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve as solve_system

from nmjax.packed.packing import check_misfits
from nmjax.patterns.nm import NM
from nmjax.plans import Plan
from nmjax.post_training.solving import Params, Structure, damped, solved
from nmjax.post_training.statistics import Statistics
from nmjax.pruning import Masks, check_masks, planned_leaves

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


def least_squares(
    params: Params, plan: Plan, statistics: Statistics, masks: Masks, *, ridge: float = 0.01
) -> Params:
    """The weights on given masks that change the output of each layer least.

    For each output, with the kept inputs k and H = G + ridge mean(diag G) I:

        W_k <- H_kk^-1 (H W)_k

    The masks may come from anywhere: another method of this package, `nmjax.one_shot`, or training
    with SR-STE, with `params` those before pruning. With all weights kept nothing changes.

    Args:
      params: parameters before pruning, which fit the plan.
      plan: from `nmjax.make_plan`.
      statistics: Gram matrices from `collect(..., kind="gram")`.
      masks: leaf name -> boolean array of the leaf's shape, True = kept, at most as many as the
        plan keeps.
      ridge: relative to the mean of the Gram's diagonal.

    Returns:
      The same tree with zeros where the masks are False; leaves outside the plan are unchanged.
      Weights of dead inputs stay as they are, where kept.

    Raises:
      ValueError: a leaf has no Gram matrix, or it does not fit the leaf; masks are missing, or
        keep more than the plan does.
    """
    check_masks(masks, planned_leaves(params, plan))
    known = {name: mask for name, mask in masks.items() if not isinstance(mask, jax.core.Tracer)}
    # Inside `jax.jit`, operations on visible masks would be traced, too.
    with jax.ensure_compile_time_eval():
        check_misfits(known, plan, "these masks keep more than the plan does; pass their own plan")
    return solved(params, plan, _solve, statistics=statistics, masks=masks, ridge=ridge)


def _solve(w: Array, gram: Array, mask: Array, structure: Structure, *, ridge: float) -> Array:
    return fitted(w, damped(gram, ridge), mask, structure)


def fitted(
    w: Float[Array, "in out"],
    h: Float[Array, "in in"],
    mask: Bool[Array, "in out"],
    structure: Structure,
) -> Float[Array, "in out"]:
    """The minimum of (w - v)^T H (w - v) over v on the mask, for each output."""
    pattern, inputs = structure.pattern, len(w)
    most = inputs * pattern.n // pattern.m if isinstance(pattern, NM) else inputs
    target = h @ w

    def of_output(given: tuple[Array, Array]) -> Array:
        target, kept = given
        # The kept inputs first: the system has only as many unknowns as the pattern keeps.
        chosen = jnp.argsort(~kept, stable=True)[:most]
        is_kept = kept[chosen]
        system = jnp.where(is_kept[:, None] & is_kept[None], h[chosen][:, chosen], 0)
        system += jnp.diag(jnp.where(is_kept, 0, 1).astype(h.dtype))
        values = solve_system(system, jnp.where(is_kept, target[chosen], 0), assume_a="pos")
        return jnp.zeros(inputs, h.dtype).at[chosen].set(values)

    columns = lax.map(of_output, (target.T, mask.T), batch_size=min(16, w.shape[1]))
    return jnp.where(mask, columns.T, 0)
