"""Scores in order: integers that sort like floating point numbers, and the n highest of them.

Compared as integers, NaN, infinities, -0.0 and denormal numbers need no special case, and nothing
is sorted, gathered or rolled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

ToKeys = Callable[[jax.Array], jax.Array]


def keep_highest(
    values: jax.Array, to_keys: ToKeys, n: ArrayLike, axes: int | tuple[int, ...]
) -> jax.Array:
    """Keeps all keys above the n-th highest, and the first so many of those equal to it.

    Bisects the integers for the n-th highest key, then for the last tie that fits: about 40 passes
    however many values compete.

    Args:
      values: any shape.
      to_keys: turns values, or slices of them, into signed integers to be compared; worked out
        again in each pass, so that nothing is stored.
      n: how many stay along `axes`, 0 <= n <= their size; may be traced.
      axes: along which values compete, not negative; the first in order is the last to vary.

    Returns:
      Boolean array of the values' shape.

    >>> keep_highest(jnp.array([3.0, 1.0, 3.0, 3.0]), signed_keys, 2, 0).tolist()
    [True, False, True, False]
    """
    axes = (axes,) if isinstance(axes, int) else axes

    def count(flags: jax.Array) -> jax.Array:
        return jnp.sum(flags, axis=axes, keepdims=True, dtype=jnp.int32)

    position: jax.Array | int = 0
    for axis in axes:
        position = position * values.shape[axis] + index(values, axis)
    keys = to_keys(values)
    bits = 8 * keys.dtype.itemsize
    lowest = lax.full_like(count(keys > 0), jnp.iinfo(keys.dtype).min, dtype=keys.dtype)
    threshold = _largest(lambda t: count(to_keys(values) >= t) >= n, lowest, bits)
    ties_kept = n - count(to_keys(values) > threshold)
    end = _largest(
        lambda end: count((to_keys(values) == threshold) & (position < end)) <= ties_kept,
        lax.full_like(lowest, 0, dtype=jnp.int32),
        math.prod(values.shape[axis] for axis in axes).bit_length(),
    )
    keys = to_keys(values)
    return (keys > threshold) | ((keys == threshold) & (position < end))


def _largest(accepts: Callable[[jax.Array], jax.Array], start: jax.Array, bits: int) -> jax.Array:
    """The largest integers in start + [0, 2^bits) that `accepts`, which is monotone, accepts."""

    def try_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found + (jnp.ones((), found.dtype) << jnp.asarray(bits - 1 - i, found.dtype))
        return jnp.where(accepts(candidate), candidate, found)

    return lax.fori_loop(0, bits, try_bit, start)


def index(values: jax.Array, axis: int) -> jax.Array:
    """Position along `axis`, of a shape that broadcasts against `values`."""
    shape = [1] * values.ndim
    shape[axis] = values.shape[axis]
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def slices(values: jax.Array, axis: int) -> Iterator[jax.Array]:
    """The slices of size 1 along `axis`."""
    return (lax.slice_in_dim(values, j, j + 1, axis=axis) for j in range(values.shape[axis]))


def magnitude_keys(w: jax.Array) -> jax.Array:
    """Integers in the order of |w|; NaN is one above infinity."""
    bits, infinity = _bits(w)
    return jnp.minimum(bits & jnp.iinfo(bits.dtype).max, infinity + 1)


def signed_keys(scores: jax.Array) -> jax.Array:
    """Integers in the order of the scores; NaN is one above infinity, -0.0 equals 0.0."""
    bits, infinity = _bits(scores)
    absolute = bits & jnp.iinfo(bits.dtype).max
    # The sign bit, not `scores < 0`: denormals count as zero where the CPU flushes them.
    signed = jnp.where(bits < 0, -absolute, absolute)
    return jnp.where(absolute > infinity, infinity + 1, signed)


def _bits(x: jax.Array) -> tuple[jax.Array, np.ndarray]:
    """The bits of floating point numbers, and of infinity, as integers of 32 bits or more."""
    if x.dtype.itemsize < 4:
        x = x.astype(jnp.float32)  # Exact, and vectorised better than narrow integers.
    dtype = np.dtype(f"int{8 * x.dtype.itemsize}")
    return lax.bitcast_convert_type(x, dtype), np.array(np.inf, x.dtype).view(dtype)


def check_real_floating(what: str, dtype: np.dtype) -> None:
    """Raises TypeError unless `dtype` is a real floating one."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{what} must be real floating point, got dtype {dtype}")
