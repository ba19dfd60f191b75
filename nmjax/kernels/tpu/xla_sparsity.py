"""Packed 1:N weights in the layout of XLA's own 1:N sparsity, and back.

HLO's `dot` takes `sparsity_config={rhs={sparsity=1xN dimension=0 stride=1 idx=2}}`, with values of
float8 and the positions as one more operand. Neither JAX nor StableHLO can say so yet.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nmjax.packed.nm import PackedNM
from nmjax.patterns.pattern import LeafPlan

_DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)


def to_xla(packed: PackedNM) -> tuple[jax.Array, jax.Array]:
    """Values (inputs / N, outputs) and their positions in the groups, uint8 of the same shape.

    Raises:
      NotImplementedError: not one 1:N matrix of float8 with consecutive groups.
    """
    pattern = packed.pattern
    if pattern.n != 1 or pattern.stride != 1 or packed.values.ndim != 3:
        raise NotImplementedError(f"XLA's sparsity is for 1:N matrices, not for {packed}")
    if packed.dtype not in _DTYPES:
        raise NotImplementedError(f"XLA's sparsity takes values of float8, not {packed.dtype}")
    return packed.values[:, 0, :], packed.positions()[:, 0, :].astype(jnp.uint8)


def from_xla(values: jax.Array, positions: jax.Array, leaf_plan: LeafPlan) -> PackedNM:
    """Inverse of `to_xla`, for a weight of that plan."""
    return PackedNM.at(values[:, None, :], positions[:, None, :], leaf_plan)
