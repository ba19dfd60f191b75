"""What masks of 1xN blocks do: blocks kept in each row, blocks that come back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import nmjax
from nmjax.blocks import split_blocks
from nmjax.sparsify import Masks


def block_flags(plan: nmjax.Plan, masks: Masks) -> dict[str, jax.Array]:
    """Which blocks stay: leaf name -> booleans (rows, inputs)."""
    return {name: _flags(plan[name], mask) for name, mask in masks.items()}


def block_measures(plan: nmjax.Plan, before: Masks, after: Masks) -> dict[str, Any]:
    """Compares the masks of two moments.

    Returns:
      "sad": mask entries that differ, int32. "regrown": blocks that are back, int32. "kept_rows":
      leaf name -> blocks kept after, in each row, int32 (rows,).
    """
    old, new = block_flags(plan, before), block_flags(plan, after)
    regrown = [jnp.sum(new[name] & ~old[name], dtype=jnp.int32) for name in new]
    return {
        "sad": nmjax.total_sad(before, after),
        "regrown": jnp.sum(jnp.stack(regrown)),
        "kept_rows": {name: jnp.sum(new[name], axis=-1, dtype=jnp.int32) for name in new},
    }


def _flags(leaf: nmjax.LeafPlan, mask: jax.Array) -> jax.Array:
    # All weights of a block share its fate, so that any of them tells it.
    return split_blocks(mask, leaf.pattern.n, leaf.axes)[..., 0]
