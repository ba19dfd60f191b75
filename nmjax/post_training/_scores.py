"""Methods that only choose what to keep: magnitude, Wanda, and RIA. The kept weights stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from nmjax.masks.arguments import check_number
from nmjax.plans import Plan
from nmjax.post_training.solving import Params, Structure, solved
from nmjax.post_training.statistics import Statistics

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def magnitude(params: Params, plan: Plan, statistics: Statistics | None = None) -> Params:
    """Keeps the largest weights of each group or block, and needs no data.

    Args:
      params: parameters that fit the plan.
      plan: from `nmjax.make_plan`; its score is not used.
      statistics: not used; it is here so that all methods are called alike.

    Returns:
      The same tree, pruned; leaves outside the plan are unchanged.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> magnitude(params, nmjax.make_plan(params, "2:4"))["kernel"].ravel().tolist()
    [4.0, 3.0, 0.0, 0.0]
    """
    del statistics
    return solved(params, plan, _by_magnitude)


def wanda(params: Params, plan: Plan, statistics: Statistics) -> Params:
    """Keeps the weights with the largest |w| times the root mean square of their input.

        score_jo = |W_jo| sqrt(s_j),    s_j = mean_t x_tj^2

    Args:
      params: parameters that fit the plan.
      plan: from `nmjax.make_plan`. A 1xN block's score is the sum over its weights.
      statistics: from `collect`, of either kind.

    Returns:
      The same tree, pruned; leaves outside the plan are unchanged.

    Raises:
      ValueError: a leaf has no statistics, or they do not fit it.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> mean_squares = {"kernel": jnp.array([[1.0, 1.0, 4.0, 25.0]])}
    >>> statistics = Statistics(mean_squares, {"kernel": jnp.ones(1)})
    >>> wanda(params, plan, statistics)["kernel"].ravel().tolist()
    [4.0, 0.0, 0.0, 1.0]

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR
    2024, section 3. It compares all inputs of an output, or n of m; ours also whole blocks.
    """
    return solved(params, plan, _by_wanda, statistics=statistics, gram=False)


def ria(params: Params, plan: Plan, statistics: Statistics, *, power: float = 0.5) -> Params:
    """Keeps the weights that are large relative to their input and their output (RIA).

        score_jo = (|W_jo| / sum_k |W_ko| + |W_jo| / sum_p |W_jp|) s_j^(power / 2)

    Args:
      params: parameters that fit the plan.
      plan: from `nmjax.make_plan`. A 1xN block's score is the sum over its weights.
      statistics: from `collect`, of either kind.
      power: how much the activations count; the paper's a.

    Returns:
      The same tree, pruned; leaves outside the plan are unchanged.

    Raises:
      ValueError: a leaf has no statistics, or they do not fit it.

    Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", ICLR 2024, section 3.1.
    """
    check_number("power", power)
    return solved(params, plan, _by_ria, statistics=statistics, gram=False, power=power)


def _by_magnitude(w: Array, structure: Structure) -> Array:
    return _kept(w, jnp.abs(w), structure)


def _by_wanda(w: Array, s: Array, structure: Structure) -> Array:
    return _kept(w, jnp.abs(w) * jnp.sqrt(_alive(s))[:, None], structure)


def _by_ria(w: Array, s: Array, structure: Structure, *, power: float) -> Array:
    size = jnp.abs(w)
    # An input or an output of zeros alone has no shares.
    shares = [size / jnp.maximum(size.sum(axis, keepdims=True), 1e-30) for axis in (0, 1)]
    return _kept(w, (shares[0] + shares[1]) * _alive(s)[:, None] ** (power / 2), structure)


def _alive(s: Float[Array, " in"]) -> Float[Array, " in"]:
    """The mean squares, or ones if all are zero: data that say nothing leave the magnitudes."""
    return jnp.where(jnp.any(s > 0), s, 1)


def _kept(
    w: Float[Array, "in out"], scores: Float[Array, "in out"], structure: Structure
) -> Float[Array, "in out"]:
    return jnp.where(structure.keep(scores), w, 0)
