"""Ranks scores as integers that sort like floats, and keeps the n highest of any number.

Compared as integers, NaN, infinities, -0.0, and denormal numbers need no special case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

if TYPE_CHECKING:
    import chex
    from jaxtyping import Array, Bool, Float, Int, Int32, Shaped

ToKeys = Callable[[jax.Array], jax.Array]


def keep_highest(
    values: Float[Array, "*shape"], to_keys: ToKeys, n: chex.Numeric, axes: int | tuple[int, ...]
) -> Bool[Array, "*shape"]:
    """Keeps the n highest keys along `axes`; ties go to the lowest positions.

    Args:
      values: any shape.
      to_keys: turns values, or slices of them, into signed integers that sort in the right order.
      n: how many are kept, 0 <= n <= the size of `axes` taken together; may be traced.
      axes: non-negative axes along which values compete. Positions count along them in the order
        given, and the last axis varies fastest.

    >>> keep_highest(jnp.array([3.0, 1.0, 3.0, 3.0]), signed_keys, 2, 0).tolist()
    [True, False, True, False]
    """
    axes = (axes,) if isinstance(axes, int) else axes

    def count(flags: jax.Array) -> jax.Array:
        return jnp.sum(flags, axis=axes, keepdims=True, dtype=jnp.int32)

    position: jax.Array | int = 0
    for axis in axes:
        position = position * values.shape[axis] + index(values, axis)
    # Bisection, not a sort: `lax.sort` and `top_k` are many times slower on CPUs. Finding the
    # n-th highest key takes one counting pass per bit of the key, however many values compete.
    keys = to_keys(values)
    bits = 8 * keys.dtype.itemsize
    # `full_like`, so that under explicit sharding the loop starts with the type its passes return.
    lowest = lax.full_like(count(keys > 0), jnp.iinfo(keys.dtype).min, dtype=keys.dtype)
    # XLA for CPUs moves `to_keys` out of the loop and stores one copy of the keys.
    threshold = _largest(lambda t: count(to_keys(values) >= t) >= n, lowest, bits)
    # More keys may equal the threshold than there are places left. A second bisection, over
    # positions, finds where the last tie that still fits ends.
    ties_kept = n - count(to_keys(values) > threshold)
    end = _largest(
        lambda end: count((to_keys(values) == threshold) & (position < end)) <= ties_kept,
        lax.full_like(lowest, 0, dtype=jnp.int32),
        math.prod(values.shape[axis] for axis in axes).bit_length(),
    )
    keys = to_keys(values)
    return (keys > threshold) | ((keys == threshold) & (position < end))


def _largest(
    accepts: Callable[[jax.Array], jax.Array], start: Int[Array, "*shape"], bits: int
) -> Int[Array, "*shape"]:
    """The largest integers in start + [0, 2^bits) that the monotone function `accepts` accepts."""

    # Highest bit first. The lowest key plus 2^31 or 2^63 must wrap to the right sum: signed
    # integers in XLA do.
    def try_bit(i: chex.Numeric, found: jax.Array) -> jax.Array:
        candidate = found + (jnp.ones((), found.dtype) << jnp.asarray(bits - 1 - i, found.dtype))
        return jnp.where(accepts(candidate), candidate, found)

    return lax.fori_loop(0, bits, try_bit, start)


def index(values: Shaped[Array, "*shape"], axis: int) -> Int32[Array, "*positions"]:
    """Positions along `axis`, in a shape that broadcasts against `values`."""
    # An iota: with a constant, XLA for CPUs is several times slower along the last axis.
    shape = [1] * values.ndim
    shape[axis] = values.shape[axis]
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def slices(values: Shaped[Array, "*shape"], axis: int) -> Iterator[jax.Array]:
    """Slices of size 1 along `axis`."""
    return (lax.slice_in_dim(values, j, j + 1, axis=axis) for j in range(values.shape[axis]))


def magnitude_keys(w: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Integers in the order of |w|; NaN is one above infinity."""
    bits, infinity = _bits(w)
    # Without the sign bit, IEEE floats sort like the integers with the same bits. The minimum gives
    # every NaN the same key, whatever its payload.
    return jnp.minimum(bits & jnp.iinfo(bits.dtype).max, infinity + 1)


def distinct_magnitudes(members: Sequence[Float[Array, "*shape"]]) -> list[Float[Array, "*shape"]]:
    """Positive floats in the order of the members' |w|, the first of equals above the others.

    Args:
      members: up to 32 arrays with one member of every group each: values of bfloat16, as float32.
    """
    # The lower half of each is free, and its top bit too after a shift by one. So NaN and infinity
    # become finite, and the position goes where no value reaches. With one more in the exponent,
    # none is denormal: TPUs compare floats in one instruction, but flush those to zero.
    keys = []
    nan = 0x7F81 << 15
    for j, member in enumerate(members):
        low = 0x00800000 + len(members) - 1 - j
        bits = lax.bitcast_convert_type(member, jnp.int32) & 0x7FFF0000
        key = lax.bitcast_convert_type((bits >> 1) + low, jnp.float32)
        keys.append(jnp.minimum(key, np.int32(nan + low).view(np.float32)))
    return keys


def signed_keys(scores: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Integers in the order of the scores; NaN is one above infinity, -0.0 equals 0.0."""
    bits, infinity = _bits(scores)
    absolute = bits & jnp.iinfo(bits.dtype).max
    # Test the sign bit, not `scores < 0`, which is false for negative denormals on CPUs that
    # flush them to zero.
    signed = jnp.where(bits < 0, -absolute, absolute)
    return jnp.where(absolute > infinity, infinity + 1, signed)


def _bits(x: Float[Array, "*shape"]) -> tuple[Int[Array, "*shape"], np.ndarray]:
    """The bits of `x` and of infinity, as integers of 32 bits or more."""
    if x.dtype.itemsize < 4:
        x = x.astype(jnp.float32)  # Exact, and XLA vectorizes it better than narrow integers.
    dtype = np.dtype(f"int{8 * x.dtype.itemsize}")
    return lax.bitcast_convert_type(x, dtype), np.array(np.inf, x.dtype).view(dtype)


def check_real_floating(what: str, dtype: np.dtype) -> None:
    """Raises TypeError unless `dtype` is a real floating-point type."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{what} must be real floating point, got dtype {dtype}")
