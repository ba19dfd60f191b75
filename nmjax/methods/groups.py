"""The groups of a weight under its plan, as the last axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.patterns import NM
from nmjax.plans import LeafPlan, Plan


class Groups(NamedTuple):
    """A weight cut into groups.

    Attributes:
      weights: (*others, groups, m), or (*others, runs, stride, m) if the members of a group lie
        apart; `others` are the axes that groups do not run along, in order.
      whole: undoes the cut, for any array of that shape.
    """

    weights: jax.Array
    whole: Callable[[jax.Array], jax.Array]


def cut(w: jax.Array, leaf: LeafPlan) -> Groups:
    """Cuts a weight into the groups of its N:M pattern.

    Args:
      w: a weight, or something of its shape.
      leaf: its plan, with an N:M pattern.
    """
    along = [axis % w.ndim for axis in leaf.reduction_axes]
    order = [*(axis for axis in range(w.ndim) if axis not in along), *along]
    moved = w.transpose(order)
    others = moved.shape[: w.ndim - len(along)]
    size = math.prod(moved.shape[len(others) :])
    pattern = cast(NM, leaf.pattern)
    m, stride = pattern.m, pattern.stride

    # Split and merge one axis at a time: explicit sharding cannot follow more.
    def apart(flat: jax.Array) -> jax.Array:
        if stride == 1:
            return flat.reshape(*others, size // m, m)
        runs = flat.reshape(*others, size // (m * stride), m * stride)
        return runs.reshape(*runs.shape[:-1], m, stride).swapaxes(-1, -2)

    def whole(groups: jax.Array) -> jax.Array:
        if stride > 1:
            groups = groups.swapaxes(-1, -2)
            groups = groups.reshape(*groups.shape[:-2], m * stride)
        return groups.reshape(*others, size).reshape(moved.shape).transpose(np.argsort(order))

    return Groups(apart(moved.reshape(*others, size)), whole)


def highest_dropped(groups: jax.Array, kept: jax.Array) -> jax.Array:
    """The largest magnitude that each group drops; 0 where it drops nothing.

    Args:
      groups: (..., m).
      kept: booleans of the same shape.
    """
    return jnp.max(jnp.where(kept, 0, jnp.abs(groups)), axis=-1, keepdims=True)


def check_nm(plan: Plan, method: str) -> None:
    """Raises ValueError unless all patterns of a plan are N:M."""
    others = {name: leaf for name, leaf in plan.items() if not isinstance(leaf.pattern, NM)}
    if others:
        raise ValueError(
            f"{method} needs N:M patterns, but these leaves have others:\n"
            + "\n".join(f"  {name} {leaf.shape}: {leaf.pattern}" for name, leaf in others.items())
            + "\nList them in exclude= of make_plan, or give them an N:M pattern in rules=."
        )
