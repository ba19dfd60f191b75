"""Calls of compiled kernels as functions that `jax.vmap` and `jax.shard_map` understand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def batched(
    product: Callable[..., jax.Array],
    x: jax.Array,
    packed: Any,
    bias: jax.Array | None,
    axis: int = 0,
) -> jax.Array:
    """`product(x, packed, bias)`, to which `jax.vmap` adds the mapped axis of x as more batch.

    `axis` is where x has its batch. If the weight is mapped too, the products run one after the
    other.
    """

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, packed: Any, bias: jax.Array | None) -> jax.Array:
        return product(x, packed, bias)

    @call.def_vmap
    def map_call(size: int, mapped: Any, x: Any, packed: Any, bias: Any) -> tuple[jax.Array, bool]:
        if any(jax.tree.leaves(mapped[1:])):
            arguments = (x, packed, bias)

            def one(i: jax.Array) -> jax.Array:
                chosen = jax.tree.map(lambda a, m: a[i] if m else a, arguments, tuple(mapped))
                return call(*chosen)

            return jax.lax.map(one, jnp.arange(size)), True
        # Packed weights are not batched: the mapped axis of x is more rows for the same weight.
        together = jnp.moveaxis(x, 0, axis)
        shape = together.shape
        merged = together.reshape(
            *shape[:axis], math.prod(shape[axis : axis + 2]), *shape[axis + 2 :]
        )
        y = call(merged, packed, bias)
        y = y.reshape(*y.shape[:axis], *shape[axis : axis + 2], *y.shape[axis + 1 :])
        return jnp.moveaxis(y, axis, 0), True

    return call(x, packed, bias)


def result_like(shape: tuple[int, ...], dtype: np.dtype, *operands: Any) -> jax.ShapeDtypeStruct:
    """A result that varies over the same manual axes of a mesh as its operands."""
    # A sum of all operands varies over every axis that one of them varies over.
    sums = jax.eval_shape(
        lambda *operands: sum(jnp.sum(x.astype(jnp.float32)) for x in operands), *operands
    )
    varies = sums.manual_axis_type
    mesh = jax.sharding.get_abstract_mesh()
    sharding = None if mesh.empty else NamedSharding(mesh, PartitionSpec(*[None] * len(shape)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, manual_axis_type=varies)
