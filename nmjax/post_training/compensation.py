"""Weights that make up for what pruning has done to the layers before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.scipy.linalg import solve as solve_system

from nmjax.plans import Plan
from nmjax.post_training.solving import Structure, damped, solved
from nmjax.post_training.statistics import Statistics

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Prune = Callable[[Any, Plan, Statistics], Any]

_RIDGE = 0.01


def compensated(prune: Prune, share: float) -> Prune:
    """A method that prunes the weights that would make up for a share of earlier errors.

    With inputs x in the dense network and x' in the pruned one, G = mean x' x'^T, and
    C = mean x' x^T, the method gets these weights in place of W:

        W + share (G + ridge I)^-1 (C - G) W

    With share 1 and without a ridge they minimize |W^T x - V^T x'|^2 over all V.

    Args:
      prune: (params, plan, statistics) -> params, a method of this package.
      share: between 0 and 1.

    Returns:
      The same with statistics of pairs, as `collected(..., dense=)` returns them.
    """

    def pruned(params: Any, plan: Plan, pairs: Statistics) -> Any:
        grams = {name: pair[..., : pair.shape[-2]] for name, pair in pairs.items()}
        aimed = solved(params, plan, _aim, statistics=pairs, share=share, ridge=_RIDGE)
        return prune(aimed, plan, Statistics(grams, pairs.rows))

    return pruned


def _aim(
    w: Float[Array, "in out"],
    pair: Float[Array, "in two_in"],
    structure: Structure,
    *,
    share: float,
    ridge: float,
) -> Float[Array, "in out"]:
    del structure
    gram, cross = jnp.split(pair, 2, axis=-1)
    missing = (cross - gram) @ w
    return w + share * solve_system(damped(gram, ridge), missing, assume_a="pos")
