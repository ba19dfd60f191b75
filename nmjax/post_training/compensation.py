"""Weights that make up for what pruning has done to the layers before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve as solve_system

from nmjax.plans import Plan
from nmjax.post_training.observing.observation import observe
from nmjax.post_training.observing.product_inputs import Layout
from nmjax.post_training.observing.totals import Total, Totals
from nmjax.post_training.solving import Structure, damped, solved
from nmjax.post_training.statistics import Statistics
from nmjax.tracing.program import Trace

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Params = TypeVar("Params")
Prune = Callable[[Any, Plan, Statistics], Any]

_NETWORKS = "pruned and dense"
_RIDGE = 0.01


def observe_pair(
    traced: Trace,
    arrays: Sequence[jax.Array],
    dense: Sequence[jax.Array],
    layouts: Mapping[str, Layout],
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
) -> Totals:
    """Runs a network as pruned so far and as it was before, and compares what its weights meet.

    Args:
      traced: the program.
      arrays: its arguments, with the parameters as pruned so far.
      dense: its parameters before pruning.
      layouts: of the weights to observe, by name.
      multiply: sums products of the rows (*stack, groups, rows, in) of two arrays.

    Returns:
      The totals of `multiply` for x', the inputs in the pruned network, and (x', x), those in both
      networks side by side: (*stack, groups, in, 2 in).
    """

    def reduce(rows: jax.Array) -> jax.Array:
        pruned, before = lax.all_gather(rows, _NETWORKS)
        return multiply(pruned, jnp.concatenate([pruned, before], axis=-1))

    def run(params: Sequence[jax.Array]) -> Totals:
        return observe(traced, [*params, *arrays[len(dense) :]], layouts, reduce)

    pairs = [jnp.stack(pair) for pair in zip(arrays, dense, strict=False)]
    totals = jax.vmap(run, axis_name=_NETWORKS)(pairs)
    # Both networks gather the same.
    return {name: Total(total.sum[0], total.rows[0]) for name, total in totals.items()}


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
      The same with statistics of `observe_pair`.
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
