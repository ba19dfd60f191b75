"""The parts of packed formats: bits of weights, strings of small integers, exact counts."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def check_dtype(dtype: Any, what: str) -> None:
    """Raises TypeError unless packed weights can have a dtype: floating, whole bytes, with a zero.

    >>> check_dtype(jnp.dtype(jnp.float8_e4m3fn), "the weights")
    """
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{what} should be floating, got {dtype}")
    bits = jnp.finfo(dtype).bits
    if bits % 8:
        raise TypeError(
            f"{what} should fill whole bytes, got {dtype}, whose numbers have {bits} bits"
        )
    # Zeros stand for what was dropped, and float8_e8m0fnu has none.
    if np.zeros((), dtype).astype(np.float32) != 0:
        raise TypeError(f"{what} should have a dtype with a zero, got {dtype}")


def nan_bits(dtype: np.dtype) -> np.ndarray:
    """The bits of a NaN, made by NumPy: `jax_debug_nans` stops at those that JAX computes."""
    return np.array(np.nan, dtype).view(f"uint{8 * dtype.itemsize}")


def as_bits(w: jax.Array) -> jax.Array:
    """Floating point numbers as unsigned integers of the same width.

    XLA's CPU compiler copies bfloat16 through float32, which quiets NaNs and flushes denormals. It
    leaves integers alone. Call this and `from_bits` outside `jax.jit`: within one computation the
    compiler turns the copies of integers back into copies of floats.

    Raises:
      TypeError: the numbers are integers already.
    """
    check_dtype(w.dtype, "packed values without scales (nmjax.quantize makes both)")
    return lax.bitcast_convert_type(w, np.dtype(f"uint{jnp.finfo(w.dtype).bits}"))


def from_bits(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Inverse of `as_bits`."""
    return lax.bitcast_convert_type(bits, dtype)


def is_nonzero(w: jax.Array) -> jax.Array:
    """Where numbers are not zero: True for NaN and denormals, False for -0.0.

    Call it outside `jax.jit`: within one computation the CPU compiler turns the comparison of the
    bits back into one of floats, which takes denormals for zeros.
    """
    nonzero = w != 0
    if jnp.finfo(w.dtype).bits % 8:
        return nonzero
    # XLA on CPUs compares denormals as zeros, so the bits decide; the shift drops the sign. NaN of
    # some float8 dtypes is the sign alone, so the comparison counts too.
    bits = as_bits(w)
    return nonzero | ((bits << np.ones((), bits.dtype)) != 0)


def index_dtype(size: int) -> np.dtype:
    """The narrowest unsigned integers that count up to size - 1."""
    return np.min_scalar_type(max(size - 1, 0))


def pack_bits(x: jax.Array, width: int) -> jax.Array:
    """Joins integers along the second-to-last axis into bytes, least significant bit first.

    Args:
      x: (*stack, count, lanes), integers below 2 ** width, or booleans of width 1.
      width: bits per integer.

    Returns:
      uint8 (*stack, bytes, lanes); unused bits of the last byte are zero.

    >>> pack_bits(jnp.array([[1], [2], [3]]), 2).tolist()  # 0b11_10_01
    [[57]]
    """
    bits = x
    if width != 1:
        bits = (x[..., :, None, :] >> _shifts(width, x.ndim + 1, x.dtype)) & 1
    joined = bits.reshape(*x.shape[:-2], x.shape[-2] * width, x.shape[-1])
    return jnp.packbits(joined, axis=-2, bitorder="little")


def unpack_bits(packed: jax.Array, width: int, count: int, xp: ModuleType = jnp) -> jax.Array:
    """Inverse of `pack_bits`, with jax.numpy or NumPy; the narrowest unsigned integers."""
    *stack, _, lanes = packed.shape
    bits = xp.unpackbits(packed, axis=-2, count=count * width, bitorder="little")
    dtype = index_dtype(2**width)
    places = bits.reshape(*stack, count, width, lanes).astype(dtype)
    return (places << _shifts(width, places.ndim, dtype)).sum(axis=-2, dtype=dtype)


def _shifts(width: int, ndim: int, dtype: np.dtype) -> np.ndarray:
    """0 to width - 1 along the second-to-last of `ndim` axes, which strict promotion asks for."""
    return np.arange(width, dtype=dtype).reshape(*[1] * (ndim - 2), width, 1)


def count_below(ascending: jax.Array, wanted: jax.Array) -> jax.Array:
    """How many numbers along the second-to-last axis are below each wanted one, by bisection.

    Args:
      ascending: integers (*stack, count, lanes).
      wanted: integers of the same dtype (*stack, any, lanes).

    Returns:
      int32, of the shape of `wanted`.

    >>> count_below(jnp.array([[1], [4], [4]]), jnp.array([[4], [5]])).ravel().tolist()
    [1, 3]
    """
    count = ascending.shape[-2]
    found = jnp.zeros_like(wanted, dtype=jnp.int32)
    for bit in reversed(range(count.bit_length())):
        further = found + 2**bit
        probe = jnp.take_along_axis(ascending, further - 1, axis=-2, mode="clip")
        found = jnp.where((further <= count) & (probe < wanted), further, found)
    return found


def exactly(flags: jax.Array, n: int, axis: int) -> jax.Array:
    """Flags with exactly n True along an axis: the first n, filled up where there are fewer.

    A packed group or row has a fixed size, but a mask may keep fewer weights than the pattern.
    """
    # The narrowest counters, since they take more memory than anything else here.
    counter = index_dtype(flags.shape[axis] + 1)
    # Dropped entries from the left take the places that are left over.
    spare = n - jnp.minimum(flags.sum(axis=axis, keepdims=True, dtype=counter), n)
    first = flags & (flags.cumsum(axis=axis, dtype=counter) <= n)
    return first | (~flags & ((~flags).cumsum(axis=axis, dtype=counter) <= spare))
