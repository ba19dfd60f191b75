"""One N:M weight in packed form: the kept values, and a few bits that say where they were.

The weight is seen as a stack of matrices (inputs, outputs), whatever its layout, and each column of
a matrix as groups of m. Outputs stay the last axis of everything, so that a vector unit finds
neighbouring outputs in neighbouring lanes, and so that whatever shards them still does.

The positions of a column's kept values make one string of bits, least significant first, filled up
with zeros to whole bytes. A group takes the shorter of two codes: n positions of ceil(log2 m) bits
each, ascending, or a bitmask of m bits.

Weights are copied as integers of their width: no NaN, infinity or -0.0 changes on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.layouts import Shape
from nmjax.patterns import NM
from nmjax.plans import LeafPlan
from nmjax.spans import merge, split


@partial(
    jax.tree_util.register_dataclass, data_fields=["values", "codes"], meta_fields=["leaf_plan"]
)
@dataclass(frozen=True, eq=False)
class PackedNM:
    """A weight of which n of every m stay, packed; a pytree node of two arrays.

    `jax.jit`, `jax.device_put`, `jax.lax.scan` over a stack, and whatever flattens trees take it
    as they take a dict of two arrays.

    Attributes:
      values: the kept weights (*stack, groups, n, outputs), in ascending position. The stack is
        every axis of the weight that is neither reduced nor an output: taps, scanned layers.
      codes: uint8 (*stack, bytes, outputs), where the values were; see `positions`.
      leaf_plan: pattern, axes and shape of the weight; static.
    """

    values: jax.Array
    codes: jax.Array
    leaf_plan: LeafPlan

    @property
    def shape(self) -> Shape:
        """Shape of the weight, axes in front of the planned ones included."""
        planned = self.leaf_plan.shape
        stack = self.values.shape[:-3]
        planned_stack = len(planned) - sum(map(len, _spans(self.leaf_plan)))
        return (*stack[: len(stack) - planned_stack], *planned)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return _nbytes(self.values) + _nbytes(self.codes)

    @property
    def least_nbytes(self) -> int:
        """Bytes that values and any encoding of the positions need: log2 C(m, n) bits a group."""
        bits = math.prod(self.shape) * _pattern(self.leaf_plan).index_bits
        return _nbytes(self.values) + math.ceil(bits / 8)

    def positions(self) -> jax.Array:
        """Where in its group each value was: unsigned integers of `values`' shape, ascending."""
        return _positions(self.codes, self.leaf_plan)


def pack_nm(w: jax.Array, mask: jax.Array, leaf_plan: LeafPlan) -> PackedNM:
    """Packs the weights that a mask keeps.

    Args:
      w: weights of `leaf_plan.shape`, or with more axes in front; a floating dtype of whole bytes.
      mask: booleans of the same shape, at most n True in each group. Groups with fewer are filled
        up with zeros. Groups with more become NaN, which tells of the mistake where a traced mask
        cannot be looked at.
      leaf_plan: an N:M pattern, and the axes.

    Raises:
      TypeError: the dtype does not fill whole bytes.
    """
    if jnp.finfo(w.dtype).bits % 8:
        raise TypeError(f"cannot pack weights of dtype {w.dtype}: it does not fill whole bytes")
    return _pack(w, mask, leaf_plan)


@partial(jax.jit, static_argnames="leaf_plan", inline=True)
def _pack(w: jax.Array, mask: jax.Array, leaf_plan: LeafPlan) -> PackedNM:
    pattern = _pattern(leaf_plan)
    bits = _grouped(lax.bitcast_convert_type(w, _unsigned(w.dtype)), leaf_plan)
    kept = _grouped(mask, leaf_plan)
    count = kept.sum(axis=-2, keepdims=True)
    # Exactly n are stored: the first n of too many, and the first dropped ones, as zeros, beside
    # too few.
    spare = pattern.n - jnp.minimum(count, pattern.n)
    stored = (kept & (kept.cumsum(axis=-2) <= pattern.n)) | (
        ~kept & ((~kept).cumsum(axis=-2) <= spare)
    )
    values, positions = _gather(jnp.where(kept, bits, 0), stored, pattern.n)
    nan = lax.bitcast_convert_type(jnp.full((), jnp.nan, w.dtype), bits.dtype)
    values = lax.bitcast_convert_type(jnp.where(count > pattern.n, nan, values), w.dtype)
    return PackedNM(values, _encode(stored, positions, pattern), leaf_plan)


@jax.jit
def unpack_nm(packed: PackedNM) -> jax.Array:
    """The weight, with zeros where nothing was kept."""
    plan, values = packed.leaf_plan, packed.values
    bits = lax.bitcast_convert_type(values, _unsigned(values.dtype))
    index = jnp.arange(_pattern(plan).m)[:, None]
    # (*stack, groups, n, m, outputs), which XLA sums without storing; one term is not zero.
    here = packed.positions()[..., :, None, :] == index
    groups = jnp.where(here, bits[..., :, None, :], 0).sum(axis=-3, dtype=bits.dtype)
    merged = groups.reshape(*groups.shape[:-3], -1, groups.shape[-1])
    return lax.bitcast_convert_type(split(merged, packed.shape, _spans(plan)), values.dtype)


def nm_misfits(kept: jax.Array, leaf_plan: LeafPlan) -> tuple[int, int]:
    """How many groups keep more than n entries, and how many groups there are."""
    counts = _grouped(kept, leaf_plan).sum(axis=-2)
    return int((counts > _pattern(leaf_plan).n).sum()), counts.size


def check_packed_nm(packed: PackedNM) -> None:
    """Raises ValueError unless arrays, as NumPy ones, are what `pack_nm` could have made."""
    plan, codes = packed.leaf_plan, np.asarray(packed.codes)
    pattern = _pattern(plan)
    inputs, outputs = (math.prod(plan.shape[axis] for axis in span) for span in _spans(plan))
    if inputs % pattern.m:
        raise ValueError(f"{inputs} inputs are not a multiple of {pattern.m}")
    groups = inputs // pattern.m
    planned = [plan.shape[axis] for axis in _stack_axes(plan)]
    stack = packed.values.shape[:-3]
    if (
        packed.values.shape[-3:] != (groups, pattern.n, outputs)
        or list(stack[len(stack) - len(planned) :]) != planned
    ):
        raise ValueError(
            f"values of shape {packed.values.shape} do not hold {pattern} of a weight of shape "
            f"{plan.shape}; expected {(*planned, groups, pattern.n, outputs)}"
        )
    expected = (*stack, -(-groups * _code_bits(pattern) // 8), outputs)
    if codes.shape != expected or codes.dtype != np.uint8:
        raise ValueError(
            f"codes are {codes.dtype} of shape {codes.shape}, expected uint8 of {expected}"
        )
    used = groups * _code_bits(pattern) % 8
    if used and codes.size and (codes[..., -1, :] >> used).any():
        raise ValueError("unused bits of the codes are not zero")
    code = _unpack_codes(codes, groups, pattern, np)
    if _is_bitmask(pattern):
        wrong = (code.sum(axis=-2) != pattern.n).sum()
    else:
        ascending = (code[..., 1:, :] > code[..., :-1, :]).all(axis=-2)
        wrong = (~(ascending & (code < pattern.m).all(axis=-2))).sum()
    if wrong:
        raise ValueError(f"{wrong} groups do not say where {pattern.n} of {pattern.m} values were")


def _gather(bits: jax.Array, stored: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The n entries of each group (…, m, outputs) that are stored, and where they were."""
    m = stored.shape[-2]
    order = jnp.where(stored, stored.cumsum(axis=-2), 0)[..., None, :, :]
    # (…, n, m, outputs), which XLA sums without storing; one of the m terms is not zero.
    here = order == jnp.arange(1, n + 1)[:, None, None]
    index = jnp.arange(m, dtype=_index_dtype(m))[:, None]
    values = jnp.where(here, bits[..., None, :, :], 0).sum(axis=-2, dtype=bits.dtype)
    return values, jnp.where(here, index, 0).sum(axis=-2, dtype=index.dtype)


def _encode(stored: jax.Array, positions: jax.Array, pattern: NM) -> jax.Array:
    """The codes of groups (*stack, groups, m or n, outputs)."""
    if _is_bitmask(pattern):
        bits = stored
    else:
        bits = (positions[..., None, :] >> _shifts(pattern, positions.dtype)) & 1
    *stack, outputs = (*bits.shape[: stored.ndim - 3], bits.shape[-1])
    return jnp.packbits(bits.reshape(*stack, -1, outputs), axis=-2, bitorder="little")


@partial(jax.jit, static_argnames="leaf_plan", inline=True)
def _positions(codes: jax.Array, leaf_plan: LeafPlan) -> jax.Array:
    pattern = _pattern(leaf_plan)
    groups = math.prod(leaf_plan.shape[axis] for axis in leaf_plan.reduction_axes) // pattern.m
    code = _unpack_codes(codes, groups, pattern, jnp)
    if not _is_bitmask(pattern):
        return code
    stored = code.astype(bool)
    return _gather(jnp.zeros(stored.shape, jnp.uint8), stored, pattern.n)[1]


def _unpack_codes(codes: jax.Array, groups: int, pattern: NM, xp: ModuleType) -> jax.Array:
    """The positions (*stack, groups, n, outputs), or the bitmask (*stack, groups, m, outputs)."""
    *stack, _, outputs = codes.shape
    count = groups * _code_bits(pattern)
    bits = xp.unpackbits(codes, axis=-2, count=count, bitorder="little")
    if _is_bitmask(pattern):
        return bits.reshape(*stack, groups, pattern.m, outputs)
    dtype = _index_dtype(pattern.m)
    places = bits.reshape(*stack, groups, pattern.n, -1, outputs).astype(dtype)
    return (places << _shifts(pattern, dtype)).sum(axis=-2, dtype=dtype)


def _grouped(x: jax.Array, leaf_plan: LeafPlan) -> jax.Array:
    """(*stack, groups, m, outputs)."""
    x = merge(x, _spans(leaf_plan))
    return x.reshape(*x.shape[:-2], -1, _pattern(leaf_plan).m, x.shape[-1])


def _spans(leaf_plan: LeafPlan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return leaf_plan.reduction_axes, leaf_plan.output_axes


def _stack_axes(leaf_plan: LeafPlan) -> list[int]:
    named = {axis for span in _spans(leaf_plan) for axis in span}
    return [axis for axis in range(-len(leaf_plan.shape), 0) if axis not in named]


def _pattern(leaf_plan: LeafPlan) -> NM:
    if not isinstance(leaf_plan.pattern, NM):
        raise TypeError(f"PackedNM holds N:M weights, got the pattern {leaf_plan.pattern}")
    return leaf_plan.pattern


def _position_bits(pattern: NM) -> int:
    return (pattern.m - 1).bit_length()


def _is_bitmask(pattern: NM) -> bool:
    return pattern.m < pattern.n * _position_bits(pattern)


def _code_bits(pattern: NM) -> int:
    """Bits of one group."""
    return min(pattern.m, pattern.n * _position_bits(pattern))


def _shifts(pattern: NM, dtype: np.dtype) -> np.ndarray:
    return np.arange(_position_bits(pattern), dtype=dtype)[:, None]


def _index_dtype(size: int) -> np.dtype:
    """The narrowest unsigned integers that count up to size - 1."""
    return np.min_scalar_type(max(size - 1, 0))


def _unsigned(dtype: np.dtype) -> np.dtype:
    """Unsigned integers of a dtype's width."""
    return np.dtype(f"uint{jnp.finfo(dtype).bits}")


def _nbytes(x: jax.Array) -> int:
    return x.size * x.dtype.itemsize
