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
    """Copies a pytree of arrays, for use inside `jax.jit`.

    Returns:
      "state": the same tree, in which boolean arrays with axes are uint8 with eight entries per
        byte along one axis. "checksums": uint32, one entry per leaf.
    """
    packed = jax.tree.map(_pack, state)
    return {"state": packed, "checksums": checksums(packed)}


def from_stored(packed: Any, like: Any) -> Any:
    """Undoes the packing in "state" of `to_stored`; `like` has the shapes and dtypes."""
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
    held = leaf.sharding.shard_shape(leaf.shape)
    spec = [
        entry if packed.shape[axis] % (leaf.shape[axis] // held[axis]) == 0 else None
        for axis, entry in enumerate(leaf.sharding.spec)
    ]
    sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(packed.shape, packed.dtype, sharding=sharding)


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
    if leaf.dtype != bool:
        leaf = lax.bitcast_convert_type(leaf, np.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    # By axis, because a reshaped `arange` would not be split as the leaf is.
    places = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = np.uint32(math.prod(leaf.shape[axis + 1 :]) % 2**32)
        places += stride * lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(leaf.astype(jnp.uint32) * (2 * places + 1), dtype=jnp.uint32)
