"""One N:M weight in packed form: the kept values, and a few bits that say where they were.

The weight is treated as a stack of matrices (inputs, outputs), for any layout, and each column of
a matrix as groups of m. Strided groups are packed as consecutive ones of the weight whose inputs
are permuted, run by run: group `run * stride + r` is the one that starts at r in its run.

Outputs are the last axis of every array, so that neighboring outputs
lie in neighboring lanes of a vector unit, and so that a sharding of the outputs still applies.

The positions of a column's kept values make one string of bits, least significant first, padded
with zeros to whole bytes. A group takes the shorter of two codes: n positions of ceil(log2 m)
bits each, ascending, or a bitmask of m bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.layouts.axes import Shape
from nmjax.packed.bits import (
    as_bits,
    check_dtype,
    count_below,
    exactly,
    from_bits,
    index_dtype,
    nan_bits,
    pack_bits,
    unpack_bits,
)
from nmjax.packed.weight import Packed, cuts
from nmjax.patterns.nm import NM
from nmjax.patterns.pattern import LeafPlan
from nmjax.trees.spans import merge, split

# Comparing every member of a group with every place takes one pass, which XLA:CPU fuses and
# vectorizes, in groups as small as this or with as few places. Beyond, it would store all n * m.
_FUSED_MEMBERS, _FUSED_PLACES = 32, 4


@partial(
    jax.tree_util.register_dataclass, data_fields=["values", "codes"], meta_fields=["leaf_plan"]
)
@dataclass(frozen=True, eq=False)
class PackedNM(Packed, pattern=NM):
    """A weight with an N:M pattern, packed; a pytree node of two arrays.

    Attributes:
      values: the kept weights (*leading, groups, n, outputs), in ascending position. The leading
        axes are those of the weight that are neither reduced nor outputs: taps, scanned layers.
      codes: uint8 (*leading, bytes, outputs), where the values were; see `positions`.
      leaf_plan: pattern, axes and shape of the weight; static.
    """

    excess: ClassVar[str] = "groups keep more than"

    values: jax.Array
    codes: jax.Array
    leaf_plan: LeafPlan

    @classmethod
    def pack(cls, w: jax.Array, mask: jax.Array, leaf_plan: LeafPlan) -> Self:
        """Packs the weights that a mask keeps, at most n in each group. There is no gradient.

        Raises:
          TypeError: packed weights cannot have that dtype.
        """
        check_dtype(w.dtype, f"weights to pack as {leaf_plan.pattern}")
        # As integers, so that XLA copies kept NaNs and denormals bit for bit.
        values, codes = _pack(as_bits(w), mask, nan_bits(w.dtype), leaf_plan)
        return cls(from_bits(values, w.dtype), codes, leaf_plan)

    @classmethod
    def at(cls, values: jax.Array, positions: jax.Array, leaf_plan: LeafPlan) -> Self:
        """Packed values whose positions are known, as `positions` returns them."""
        pattern = _pattern(leaf_plan)
        code = positions
        if _is_bitmask(pattern):
            members = _column(pattern.m, positions.ndim, positions.dtype)[..., None]
            code = (positions[..., None, :, :] == members).any(axis=-2)
        return cls(values, pack_bits(_flat(code), _code_width(pattern)), leaf_plan)

    def unpack(self) -> jax.Array:
        """The weight, with zeros where nothing was kept. Its gradient reaches the values."""
        self.check_arrays()
        self.check_whole()
        return _unpack_weight(self)

    def check_arrays(self) -> None:
        """Checks the dtypes and shapes of the arrays against the plan.

        Raises:
          TypeError: a dtype that `pack` does not make.
          ValueError: a shape that the plan does not allow, even for a shard.
        """
        super().check_arrays()
        plan, pattern, shape = self.leaf_plan, self.pattern, np.shape(self.values)
        groups, n, outputs = shape[-3:] if len(shape) >= 3 else (0, 0, 0)
        planned = plan.inputs // pattern.m
        if n != pattern.n or not cuts(groups, planned) or not cuts(outputs, plan.outputs):
            raise ValueError(
                f"values of shape {shape} cannot hold {self}; expected (..., {planned}, "
                f"{pattern.n}, {plan.outputs}), or equal parts of the groups or the outputs"
            )
        if groups % pattern.stride:
            raise ValueError(
                f"a shard of {groups} of the {planned} groups of {self} cuts a run of "
                f"{pattern.stride} groups; shard the outputs instead"
            )
        # A stack in front may have been mapped or scanned away, but the taps are of one weight.
        taps = tuple(plan.shape[axis] for axis in sorted(plan.tap_axes))
        if shape[:-3][-len(taps) :] != taps and taps:
            raise ValueError(
                f"values of shape {shape} cannot hold {self}: the axes in front of the last three "
                f"should end with the taps {taps}"
            )
        bits = groups * _codes_per_group(pattern) * _code_width(pattern)
        if groups != planned and bits % 8:
            raise ValueError(
                f"a shard of {groups} of the {planned} groups of {self} cuts a byte of the codes; "
                "shard the outputs instead"
            )
        self.check_array("codes", np.dtype(np.uint8), (*shape[:-3], math.ceil(bits / 8), outputs))

    @classmethod
    def misfits(cls, kept: jax.Array, leaf_plan: LeafPlan) -> tuple[int, int]:
        """How many groups keep more than n entries, and how many groups there are."""
        counts = _grouped(kept, leaf_plan).sum(axis=-2)
        return int((counts > _pattern(leaf_plan).n).sum()), counts.size

    @classmethod
    def cover(cls, nonzero: jax.Array, mask: jax.Array, leaf_plan: LeafPlan) -> jax.Array:
        """The mask, replaced by `nonzero` in groups where the mask misses some and all fit."""
        wanted, kept = _grouped(nonzero, leaf_plan), _grouped(mask, leaf_plan)
        missed = (wanted & ~kept).any(axis=-2, keepdims=True)
        fit = wanted.sum(axis=-2, keepdims=True) <= _pattern(leaf_plan).n
        groups = jnp.where(missed & fit, wanted, kept)
        return _ungrouped(groups, nonzero.shape, leaf_plan)

    def check(self) -> None:
        """Raises ValueError unless the arrays, of NumPy, are what `pack` could have made."""
        plan, pattern, codes = self.leaf_plan, self.pattern, self.codes
        groups = plan.inputs // pattern.m
        self.check_values((groups, pattern.n, plan.outputs))
        spare = -groups * _codes_per_group(pattern) * _code_width(pattern) % 8
        if spare and (codes[..., -1:, :] >> (8 - spare)).any():
            raise ValueError("unused bits of the codes are not zero")
        code = _unpack_codes(codes, groups, pattern, np)
        if _is_bitmask(pattern):
            right = code.sum(axis=-2, dtype=np.int64) == pattern.n
        else:
            ascending = (code[..., 1:, :] > code[..., :-1, :]).all(axis=-2)
            right = ascending & (code[..., -1, :] < pattern.m)
        if not right.all():
            raise ValueError(
                f"the codes of {(~right).sum():,} groups do not keep {pattern.n} of {pattern.m}"
            )

    @property
    def pattern(self) -> NM:
        """The weight's pattern."""
        return _pattern(self.leaf_plan)

    @property
    def least_nbytes(self) -> int:
        """Bytes for the values, and log2 C(m, n) bits for each group's positions."""
        self.check_arrays()
        bits = math.prod(self.shape) * self.pattern.index_bits
        return self.values.size * self.dtype.itemsize + math.ceil(bits / 8)

    @property
    def leading(self) -> Shape:
        """Sizes of the taps' axes and of the stack's."""
        return self.values.shape[:-3]

    @property
    def inputs(self) -> int:
        """Number of inputs that the arrays hold."""
        return self.values.shape[-3] * self.pattern.m

    @property
    def outputs(self) -> int:
        """Number of outputs that the arrays hold."""
        return self.values.shape[-1]

    @property
    def taps(self) -> Shape:
        """Sizes of the taps' axes; all leading axes if the plan does not know which are taps."""
        return self.leading if self._taps_unknown else super().taps

    @property
    def kernel_taps(self) -> Shape:
        """Sizes of the spatial axes, which are reduction axes where groups run over them."""
        return self.reduction_shape[1:] if self.pattern.needs_taps else self.taps

    @property
    def stack(self) -> Shape:
        """Sizes of the axes in front of one weight; none if the plan does not know the taps."""
        return self.leading[: len(self.leading) - len(self.taps)]

    def first_layer(self) -> Self:
        """The first weight of a stack. Leading axes that the plan does not know are a stack."""
        layer = self
        for _ in self.leading if self._taps_unknown else self.stack:
            layer = jax.tree.map(lambda array: array[0], layer)
        return layer

    def dense_matrices(self) -> jax.Array:
        """The weight with its zeros, (*taps, inputs, outputs)."""
        w = self.as_matrices().unpack()
        if not self.pattern.needs_taps:
            return w
        # Groups run over (input, *taps) of each filter.
        return jnp.moveaxis(w.reshape(*self.reduction_shape, w.shape[-1]), 0, -2)

    def by_group(self, x: jax.Array) -> jax.Array:
        """Inputs (..., inputs) of a product in the order in which the groups are packed."""
        m, stride = self.pattern.m, self.pattern.stride
        if stride == 1:
            return x
        # A transposition: it costs one pass over x, and x is small beside the weight.
        return x.reshape(*x.shape[:-1], -1, m, stride).swapaxes(-2, -1).reshape(x.shape)

    def positions(self) -> jax.Array:
        """Where in its group each value was: unsigned integers of `values`' shape, ascending."""
        self.check_arrays()
        return _positions(self.codes, self.leaf_plan)

    @property
    def _taps_unknown(self) -> bool:
        return not self.pattern.needs_taps and not self.leaf_plan.tap_axes


@jax.custom_vjp
def _unpack_weight(packed: PackedNM) -> jax.Array:
    bits = _unpack(as_bits(packed.values), packed.codes, packed.shape, packed.leaf_plan)
    return from_bits(bits, packed.dtype)


def _unpack_forward(packed: PackedNM) -> tuple[jax.Array, PackedNM]:
    return _unpack_weight(packed), packed


def _unpack_backward(packed: PackedNM, g: jax.Array) -> tuple[PackedNM]:
    groups = _grouped(g, packed.leaf_plan)
    # The gradient of a kept value is the gradient at its place.
    values = jnp.take_along_axis(groups, packed.positions().astype(jnp.int32), axis=-2)
    return (PackedNM(values, None, packed.leaf_plan),)  # type: ignore[arg-type]


_unpack_weight.defvjp(_unpack_forward, _unpack_backward)


@partial(jax.jit, static_argnames="leaf_plan", inline=True)
def _pack(
    bits: jax.Array, mask: jax.Array, nan: jax.Array, leaf_plan: LeafPlan
) -> tuple[jax.Array, jax.Array]:
    """Values and codes."""
    pattern = _pattern(leaf_plan)
    # A mask that keeps fewer than n is filled up, so that every group has the same size.
    bits, kept = _grouped(bits, leaf_plan), _grouped(mask, leaf_plan)
    stored = exactly(kept, pattern.n, axis=-2)
    values, positions = _gather(jnp.where(kept, bits, 0), stored, pattern.n)
    # Visible as NaN, since a traced mask cannot raise.
    too_many = kept.sum(axis=-2, keepdims=True, dtype=jnp.int32) > pattern.n
    code = stored if _is_bitmask(pattern) else positions
    return jnp.where(too_many, nan, values), pack_bits(_flat(code), _code_width(pattern))


@partial(jax.jit, static_argnames=("shape", "leaf_plan"), inline=True)
def _unpack(bits: jax.Array, codes: jax.Array, shape: Shape, leaf_plan: LeafPlan) -> jax.Array:
    """The weight's bits from those of the values."""
    pattern = _pattern(leaf_plan)
    if _is_fused(pattern.n, pattern.m):
        positions = _positions(codes, leaf_plan)
        # (*stack, groups, n, m, outputs), which XLA sums without storing; one term is nonzero.
        here = positions[..., :, None, :] == _column(pattern.m, positions.ndim + 1, positions.dtype)
        groups = jnp.where(here, bits[..., :, None, :], 0).sum(axis=-3, dtype=bits.dtype)
    else:
        code = _unpack_codes(codes, leaf_plan.inputs // pattern.m, pattern, jnp)
        if _is_bitmask(pattern):
            rank, here = code.cumsum(axis=-2, dtype=jnp.int32) - 1, code == 1
        else:
            members = _column_like(code, pattern.m)
            rank = count_below(code, members)
            here = jnp.take_along_axis(code, rank, axis=-2, mode="clip") == members
        groups = jnp.where(here, jnp.take_along_axis(bits, rank, axis=-2, mode="clip"), 0)
    return _ungrouped(groups, shape, leaf_plan)


def _gather(bits: jax.Array, stored: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The n stored entries of each group (..., m, outputs), and where they were.

    XLA:CPU runs gathers one element at a time, so small groups compare instead.
    """
    m = stored.shape[-2]
    if not _is_fused(n, m):
        ranks = stored.cumsum(axis=-2, dtype=index_dtype(m + 1))
        wanted = _column_like(ranks, n) + 1
        positions = count_below(ranks, wanted)
        values = jnp.take_along_axis(bits, positions, axis=-2, mode="clip")
        return values, positions.astype(index_dtype(m))
    # The rank of each stored member in its group, from 1; 0 for the others.
    order = jnp.where(stored, stored.cumsum(axis=-2, dtype=index_dtype(m + 1)), 0)
    # (..., n, m, outputs), which XLA sums without storing; at most one of m terms is nonzero.
    ranks = _column(n, order.ndim, order.dtype) + 1
    here = order[..., None, :, :] == ranks[..., :, None, :]
    index = _column(m, order.ndim + 1, index_dtype(m))
    values = jnp.where(here, bits[..., None, :, :], 0).sum(axis=-2, dtype=bits.dtype)
    return values, jnp.where(here, index, 0).sum(axis=-2, dtype=index.dtype)


@partial(jax.jit, static_argnames="leaf_plan", inline=True)
def _positions(codes: jax.Array, leaf_plan: LeafPlan) -> jax.Array:
    pattern = _pattern(leaf_plan)
    code = _unpack_codes(codes, leaf_plan.inputs // pattern.m, pattern, jnp)
    if not _is_bitmask(pattern):
        return code
    return _gather(jnp.zeros(code.shape, jnp.uint8), code.astype(bool), pattern.n)[1]


def _column(count: int, ndim: int, dtype: np.dtype) -> jax.Array:
    """0 to count - 1 along the second-to-last of `ndim` axes."""
    return jnp.arange(count, dtype=dtype).reshape(*[1] * (ndim - 2), count, 1)


def _column_like(x: jax.Array, count: int) -> jax.Array:
    """0 to count - 1 along the second-to-last axis; the other axes are those of x."""
    # Computed from x, so that it is sharded like x over explicit axes of a mesh.
    return jnp.zeros_like(x[..., :1, :]) + _column(count, x.ndim, x.dtype)


def _is_fused(n: int, m: int) -> bool:
    return m <= _FUSED_MEMBERS or n <= _FUSED_PLACES


def _unpack_codes(codes: jax.Array, groups: int, pattern: NM, xp: ModuleType) -> jax.Array:
    """The positions (*stack, groups, n, outputs), or the bitmask (*stack, groups, m, outputs)."""
    per_group = _codes_per_group(pattern)
    code = unpack_bits(codes, _code_width(pattern), groups * per_group, xp)
    return code.reshape(*code.shape[:-2], groups, per_group, code.shape[-1])


def _grouped(x: jax.Array, leaf_plan: LeafPlan) -> jax.Array:
    """(*stack, groups, m, outputs)."""
    x = merge(x, _spans(leaf_plan))
    m, stride = _pattern(leaf_plan).m, _pattern(leaf_plan).stride
    *stack, inputs, outputs = x.shape
    if stride > 1:
        # Behind this swap, the members of a group are neighbors.
        x = x.reshape(*stack, inputs // (m * stride), m, stride, outputs).swapaxes(-3, -2)
    return x.reshape(*stack, inputs // m, m, outputs)


def _ungrouped(groups: jax.Array, shape: Shape, leaf_plan: LeafPlan) -> jax.Array:
    """Undoes `_grouped`, given the shape of the weight."""
    *stack, count, m, outputs = groups.shape
    stride = _pattern(leaf_plan).stride
    if stride > 1:
        groups = groups.reshape(*stack, count // stride, stride, m, outputs).swapaxes(-3, -2)
    return split(groups.reshape(*stack, count * m, outputs), shape, _spans(leaf_plan))


def _flat(groups: jax.Array) -> jax.Array:
    """(*stack, all members of all groups, outputs)."""
    *stack, count, members, outputs = groups.shape
    return groups.reshape(*stack, count * members, outputs)


def _spans(leaf_plan: LeafPlan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return leaf_plan.reduction_axes, leaf_plan.output_axes


def _pattern(leaf_plan: LeafPlan) -> NM:
    pattern: NM = PackedNM.pattern_of(leaf_plan)
    return pattern


def _is_bitmask(pattern: NM) -> bool:
    """Whether a bitmask is the shorter code."""
    return pattern.m < pattern.n * (pattern.m - 1).bit_length()


def _code_width(pattern: NM) -> int:
    return 1 if _is_bitmask(pattern) else (pattern.m - 1).bit_length()


def _codes_per_group(pattern: NM) -> int:
    return pattern.m if _is_bitmask(pattern) else pattern.n
