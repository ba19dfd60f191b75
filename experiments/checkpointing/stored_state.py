"""A training state as stored on disk: masks at one bit per weight, and checksums.

Orbax 0.12.8 does not check the numbers that it reads: in a data file of random weights, each of
100 single flipped bits came back as another number, without an error. So each leaf has a checksum.
Bits and sums are computed on the devices that hold the arrays, in integers, so that the sum of a
state does not depend on how it is split.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


def to_stored(state: Any) -> dict[str, Any]:
    """Packs masks and computes checksums, for use inside `jax.jit`. Copies every array.

    Args:
      state: a pytree of arrays, which may be donated to a training step afterwards.

    Returns:
      "state": the same tree, in which boolean arrays with axes are uint8 with eight entries per
        byte along one axis. "checksums": uint32, one entry per leaf.
    """
    packed = jax.tree.map(_pack, state)
    return {"state": packed, "checksums": checksums(packed)}


def from_stored(packed: Any, like: Any) -> Any:
    """Undoes the packing of `to_stored`.

    Args:
      packed: its "state".
      like: a tree of the shapes and dtypes of the result.
    """
    return jax.tree.map(_unpack, packed, like)


def checksums(state: Any) -> jax.Array:
    """Returns a uint32 per leaf: the sum, modulo 2^32, of each entry's bits times an odd number.

    The factors are 1, 3, 5, ... in row-major order. They are odd so that a change of one entry
    always changes the sum, and distinct so that entries that change places do.
    """
    return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(state)])


def packing_axis(shape: tuple[int, ...]) -> int:
    """Returns the axis along which a mask is packed: the last that 8 divides, or the last."""
    return max((axis for axis, size in enumerate(shape) if size % 8 == 0), default=len(shape) - 1)


def split_alike(packed: jax.ShapeDtypeStruct, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Splits a stored array as the array itself, except along axes that no longer divide."""
    sharding = leaf.sharding
    shards = [
        size // held
        for size, held in zip(leaf.shape, sharding.shard_shape(leaf.shape), strict=True)
    ]
    entries = (*sharding.spec, *[None] * (len(shards) - len(sharding.spec)))
    spec = [
        entry if size % count == 0 else None
        for entry, size, count in zip(entries, packed.shape, shards, strict=True)
    ]
    return jax.ShapeDtypeStruct(
        packed.shape, packed.dtype, sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec))
    )


def _pack(leaf: jax.Array) -> jax.Array:
    if leaf.dtype != bool or leaf.ndim == 0:
        return jnp.copy(leaf)
    return jnp.packbits(leaf, axis=packing_axis(leaf.shape), bitorder="little")


def _unpack(packed: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    if like.dtype != bool or not like.shape:
        return packed
    axis = packing_axis(like.shape)
    bits = jnp.unpackbits(packed, axis=axis, count=like.shape[axis], bitorder="little")
    return bits.astype(bool)


def _checksum(leaf: jax.Array) -> jax.Array:
    bits = leaf if leaf.dtype == bool else lax.bitcast_convert_type(leaf, _unsigned(leaf.dtype))
    words = bits.astype(jnp.uint32)
    places = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, _ in enumerate(leaf.shape):
        stride = np.uint32(math.prod(leaf.shape[axis + 1 :]) % 2**32)
        places += stride * lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(words * (2 * places + 1), dtype=jnp.uint32)


def _unsigned(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"uint{8 * dtype.itemsize}")
