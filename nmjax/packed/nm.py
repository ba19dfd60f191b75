"""One N:M weight in packed form: the kept values, and a few bits that say where they were.

The weight is seen as a stack of matrices (inputs, outputs), whatever its layout, and each column of
a matrix as groups of m. Outputs stay the last axis of everything, so that a vector unit finds
neighbouring outputs in neighbouring lanes, and so that whatever shards them still does.

The positions of a column's kept values make one string of bits, least significant first, filled up
with zeros to whole bytes. A group takes the shorter of two codes: n positions of ceil(log2 m) bits
each, ascending, or a bitmask of m bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.layouts import Shape
from nmjax.packed.bits import as_bits, exactly, from_bits, index_dtype, pack_bits, unpack_bits
from nmjax.patterns import NM
from nmjax.plans import LeafPlan
from nmjax.trees.spans import merge, split, stack_axes


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
        """Shape of the weight: axes in front of the planned ones included, axes sliced off not."""
        planned = self.leaf_plan.shape
        stack = self.values.shape[:-3]
        in_front = len(stack) - len(stack_axes(len(planned), _spans(self.leaf_plan)))
        return (*stack[: max(in_front, 0)], *planned[max(-in_front, 0) :])

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.values.size * self.dtype.itemsize + self.codes.size

    @property
    def least_nbytes(self) -> int:
        """Bytes that values and any encoding of the positions need: log2 C(m, n) bits a group."""
        bits = math.prod(self.shape) * _pattern(self.leaf_plan).index_bits
        return self.values.size * self.dtype.itemsize + math.ceil(bits / 8)

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

    There is no gradient: bits have none.

    Raises:
      TypeError: the dtype does not fill whole bytes.
    """
    nan = as_bits(jnp.full((), jnp.nan, w.dtype))
    values, codes = _pack(as_bits(w), mask, nan, leaf_plan)
    return PackedNM(from_bits(values, w.dtype), codes, leaf_plan)


@jax.custom_vjp
def unpack_nm(packed: PackedNM) -> jax.Array:
    """The weight, with zeros where nothing was kept; its gradient reaches the values."""
    bits = _unpack(as_bits(packed.values), packed.codes, packed.shape, packed.leaf_plan)
    return from_bits(bits, packed.dtype)


def _unpack_forward(packed: PackedNM) -> tuple[jax.Array, PackedNM]:
    return unpack_nm(packed), packed


def _unpack_backward(packed: PackedNM, g: jax.Array) -> tuple[PackedNM]:
    groups = _grouped(g, packed.leaf_plan)
    values = jnp.take_along_axis(groups, packed.positions().astype(jnp.int32), axis=-2)
    return (PackedNM(values, None, packed.leaf_plan),)  # type: ignore[arg-type]


unpack_nm.defvjp(_unpack_forward, _unpack_backward)


def nm_misfits(kept: jax.Array, leaf_plan: LeafPlan) -> tuple[int, int]:
    """How many groups keep more than n entries, and how many groups there are."""
    counts = _grouped(kept, leaf_plan).sum(axis=-2)
    return int((counts > _pattern(leaf_plan).n).sum()), counts.size


def check_packed_nm(packed: PackedNM) -> None:
    """Raises ValueError unless the arrays, of NumPy, are what `pack_nm` could have made."""
    plan, pattern, codes = packed.leaf_plan, _pattern(packed.leaf_plan), packed.codes
    if plan.misfit is not None:
        raise ValueError(plan.misfit)
    groups = plan.inputs // pattern.m
    planned = [plan.shape[axis] for axis in stack_axes(len(plan.shape), _spans(plan))]
    expected: list[int] = [*planned, groups, pattern.n, plan.outputs]
    if list(packed.values.shape[max(packed.values.ndim - len(expected), 0) :]) != expected:
        raise ValueError(
            f"values of shape {packed.values.shape} cannot hold {pattern} of a weight of shape "
            f"{plan.shape}; expected {tuple(expected)}"
        )
    count = groups * _codes_per_group(pattern)
    spare = -count * _code_width(pattern) % 8
    shape = (*packed.values.shape[:-3], (count * _code_width(pattern) + spare) // 8, plan.outputs)
    if codes.shape != shape or codes.dtype != np.uint8:
        raise ValueError(f"codes are {codes.dtype}{codes.shape}, expected uint8{shape}")
    if spare and (codes[..., -1:, :] >> (8 - spare)).any():
        raise ValueError("unused bits of the codes are not zero")
    code = _unpack_codes(codes, groups, pattern, np)
    if _is_bitmask(pattern):
        right = code.sum(axis=-2, dtype=np.int64) == pattern.n
    else:
        right = (code[..., 1:, :] > code[..., :-1, :]).all(axis=-2) & (code[..., -1, :] < pattern.m)
    if not right.all():
        raise ValueError(
            f"the codes of {(~right).sum():,} groups do not keep {pattern.n} of {pattern.m}"
        )


@partial(jax.jit, static_argnames="leaf_plan", inline=True)
def _pack(
    bits: jax.Array, mask: jax.Array, nan: jax.Array, leaf_plan: LeafPlan
) -> tuple[jax.Array, jax.Array]:
    """Values and codes."""
    pattern = _pattern(leaf_plan)
    bits, kept = _grouped(bits, leaf_plan), _grouped(mask, leaf_plan)
    stored = exactly(kept, pattern.n, axis=-2)
    values, positions = _gather(jnp.where(kept, bits, 0), stored, pattern.n)
    too_many = kept.sum(axis=-2, keepdims=True) > pattern.n
    code = stored if _is_bitmask(pattern) else positions
    return jnp.where(too_many, nan, values), pack_bits(_flat(code), _code_width(pattern))


@partial(jax.jit, static_argnames=("shape", "leaf_plan"), inline=True)
def _unpack(bits: jax.Array, codes: jax.Array, shape: Shape, leaf_plan: LeafPlan) -> jax.Array:
    """The weight's bits from those of the values."""
    index = jnp.arange(_pattern(leaf_plan).m)[:, None]
    # (*stack, groups, n, m, outputs), which XLA sums without storing; one term is not zero.
    here = _positions(codes, leaf_plan)[..., :, None, :] == index
    groups = jnp.where(here, bits[..., :, None, :], 0).sum(axis=-3, dtype=bits.dtype)
    return split(_flat(groups), shape, _spans(leaf_plan))


def _gather(bits: jax.Array, stored: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The n entries of each group (…, m, outputs) that are stored, and where they were."""
    m = stored.shape[-2]
    order = jnp.where(stored, stored.cumsum(axis=-2), 0)[..., None, :, :]
    # (…, n, m, outputs), which XLA sums without storing; one of the m terms is not zero.
    here = order == jnp.arange(1, n + 1)[:, None, None]
    index = jnp.arange(m, dtype=index_dtype(m))[:, None]
    values = jnp.where(here, bits[..., None, :, :], 0).sum(axis=-2, dtype=bits.dtype)
    return values, jnp.where(here, index, 0).sum(axis=-2, dtype=index.dtype)


@partial(jax.jit, static_argnames="leaf_plan", inline=True)
def _positions(codes: jax.Array, leaf_plan: LeafPlan) -> jax.Array:
    pattern = _pattern(leaf_plan)
    code = _unpack_codes(codes, leaf_plan.inputs // pattern.m, pattern, jnp)
    if not _is_bitmask(pattern):
        return code
    return _gather(jnp.zeros(code.shape, jnp.uint8), code.astype(bool), pattern.n)[1]


def _unpack_codes(codes: jax.Array, groups: int, pattern: NM, xp: ModuleType) -> jax.Array:
    """The positions (*stack, groups, n, outputs), or the bitmask (*stack, groups, m, outputs)."""
    per_group = _codes_per_group(pattern)
    code = unpack_bits(codes, _code_width(pattern), groups * per_group, xp)
    return code.reshape(*code.shape[:-2], groups, per_group, code.shape[-1])


def _grouped(x: jax.Array, leaf_plan: LeafPlan) -> jax.Array:
    """(*stack, groups, m, outputs)."""
    x = merge(x, _spans(leaf_plan))
    m = _pattern(leaf_plan).m
    return x.reshape(*x.shape[:-2], x.shape[-2] // m, m, x.shape[-1])


def _flat(groups: jax.Array) -> jax.Array:
    """(*stack, all members of all groups, outputs)."""
    *stack, count, members, outputs = groups.shape
    return groups.reshape(*stack, count * members, outputs)


def _spans(leaf_plan: LeafPlan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return leaf_plan.reduction_axes, leaf_plan.output_axes


def _pattern(leaf_plan: LeafPlan) -> NM:
    if not isinstance(leaf_plan.pattern, NM):
        raise TypeError(f"PackedNM holds N:M weights, got the pattern {leaf_plan.pattern}")
    return leaf_plan.pattern


def _is_bitmask(pattern: NM) -> bool:
    """Whether a bitmask is the shorter code."""
    return pattern.m < pattern.n * (pattern.m - 1).bit_length()


def _code_width(pattern: NM) -> int:
    return 1 if _is_bitmask(pattern) else (pattern.m - 1).bit_length()


def _codes_per_group(pattern: NM) -> int:
    return pattern.m if _is_bitmask(pattern) else pattern.n
