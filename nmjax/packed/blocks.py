"""One 1xN weight in packed form: the kept blocks, and the input channel of each.

A block is N consecutive output channels at one input channel, with all taps. Its values are
contiguous, tap by tap, with the N outputs of a tap side by side, so one vector load reads them all.

Uniform rows keep the same number of blocks, so a plain array holds them. If the blocks of a
whole layer compete, rows differ and the format is block compressed sparse rows (BSR), with
pointers that say where each row begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.layouts.axes import Shape
from nmjax.masks.blocks import split_blocks
from nmjax.packed.bits import as_bits, check_dtype, exactly, from_bits, index_dtype, nan_bits
from nmjax.packed.weight import Packed, cuts
from nmjax.patterns.block1xn import Block1xN
from nmjax.patterns.pattern import LeafPlan
from nmjax.trees.spans import Span, split


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "indices", "row_pointers"],
    meta_fields=["leaf_plan"],
)
@dataclass(frozen=True, eq=False)
class PackedBlocks(Packed, pattern=Block1xN):
    """A weight with a 1xN pattern, packed; a pytree node of two or three arrays.

    The leading axes are those of the weight that are neither reduced, nor outputs, nor taps.
    `rows` are outputs / N, and `block` is taps * N weights: N outputs for the first tap, then for
    the next.

    Attributes:
      values: the kept blocks: uniform (*leading, rows, kept, block), else (*leading, kept, block)
        row after row.
      indices: the input channel of each, (*leading, rows, kept) or (*leading, kept), ascending in
        each row; the narrowest unsigned integers that count all inputs.
      row_pointers: None if uniform, else int32 (*leading, rows + 1): row i holds the blocks
        row_pointers[i] to row_pointers[i + 1] - 1.
      leaf_plan: pattern, axes and shape of the weight; static.
    """

    excess: ClassVar[str] = "blocks are more than"

    values: jax.Array
    indices: jax.Array
    row_pointers: jax.Array | None
    leaf_plan: LeafPlan

    @classmethod
    def pack(cls, w: jax.Array, mask: jax.Array, leaf_plan: LeafPlan) -> Self:
        """Packs the blocks that a mask keeps. There is no gradient.

        A block with a True anywhere is kept whole, its other weights as zeros. Rows, or layers,
        that keep too many blocks become NaN.

        Raises:
          TypeError: packed weights cannot have that dtype.
        """
        check_dtype(w.dtype, f"weights to pack as {leaf_plan.pattern}")
        # As integers, so that XLA copies kept NaNs and denormals bit for bit.
        values, indices, row_pointers = _pack(as_bits(w), mask, nan_bits(w.dtype), leaf_plan)
        return cls(from_bits(values, w.dtype), indices, row_pointers, leaf_plan)

    def unpack(self) -> jax.Array:
        """The weight, with zeros where nothing was kept. Its gradient reaches the values."""
        self.check_arrays()
        self.check_whole()
        return _unpack_weight(self)

    def check_arrays(self) -> None:
        """Checks the dtypes and shapes of the arrays against the plan.

        Raises:
          TypeError: a dtype that `pack` does not make.
          ValueError: a shape that the plan does not allow; a shard, unless the rows are uniform.
        """
        super().check_arrays()
        plan, pattern, shape = self.leaf_plan, self.pattern, np.shape(self.values)
        parts, _, kept = _competition(plan)
        block = math.prod(plan.shape[axis] for axis in plan.tap_axes) * pattern.n
        if pattern.uniform:
            fits = len(shape) >= 3 and cuts(shape[-3], parts) and shape[-2:] == (kept, block)
            expected = f"(..., {parts}, {kept}, {block}), or equal parts of the rows"
        else:
            fits, expected = shape[-2:] == (kept, block), f"(..., {kept}, {block})"
        if not fits:
            raise ValueError(f"values of shape {shape} cannot hold {self}; expected {expected}")
        self.check_array("indices", index_dtype(plan.inputs), shape[:-1])
        if pattern.uniform:
            if self.row_pointers is not None:
                raise ValueError(f"{self} has row pointers, although its rows are uniform")
            return
        expected_pointers = (*shape[:-2], plan.outputs // pattern.n + 1)
        pointers: Shape = getattr(self.row_pointers, "shape", ())
        if pointers and pointers != expected_pointers:
            raise ValueError(
                f"this is a shard of {self}: {pointers[-1] - 1} row pointers for "
                f"{expected_pointers[-1] - 1} rows of blocks, expected int32{expected_pointers}. "
                "Only uniform rows can be cut by outputs; use a plan without /layer"
            )
        self.check_array("row_pointers", np.dtype(np.int32), expected_pointers)

    @classmethod
    def misfits(cls, kept: jax.Array, leaf_plan: LeafPlan) -> tuple[int, int]:
        """How many blocks are kept beyond what the pattern keeps, and how many blocks there are."""
        rows, size, allowed = _competition(leaf_plan)
        # One nonzero weight keeps its block.
        flags = _blocks_of(kept, leaf_plan).any(axis=-1)
        counts = flags.reshape(*flags.shape[:-2], rows, size).sum(axis=-1)
        return int(jnp.maximum(counts - allowed, 0).sum()), flags.size

    @classmethod
    def cover(cls, nonzero: jax.Array, mask: jax.Array, leaf_plan: LeafPlan) -> jax.Array:
        """The mask, replaced by `nonzero` where it misses some and all of their blocks fit."""
        rows, size, allowed = _competition(leaf_plan)
        blocks = _blocks_of(nonzero, leaf_plan)
        wanted = blocks.reshape(*blocks.shape[:-3], rows, size, blocks.shape[-1])
        kept = _blocks_of(mask, leaf_plan).reshape(wanted.shape)
        missed = (wanted & ~kept).any(axis=(-2, -1), keepdims=True)
        fit = wanted.any(axis=-1, keepdims=True).sum(axis=-2, keepdims=True) <= allowed
        chosen = jnp.where(missed & fit, wanted, kept)
        chosen = chosen.reshape(*blocks.shape[:-3], -1, blocks.shape[-1])
        return split(_unblocked(chosen, leaf_plan), nonzero.shape, _spans(leaf_plan))

    @classmethod
    def stored_plan(cls, leaf_plan: LeafPlan, shape: Shape) -> LeafPlan:
        """Earlier files hold one more block where floating point rounded the dropped ones down."""
        pattern = _pattern(leaf_plan)
        _, size, kept = _competition(leaf_plan)
        # 0.29 * 100 is 28.999999999999996.
        before = size - math.floor(pattern.sparsity * size)
        if kept == before or len(shape) < 2 or shape[-2] != before:
            return leaf_plan
        held = Block1xN(pattern.n, (size - before) / size, pattern.uniform)
        return replace(leaf_plan, pattern=held)

    def check(self) -> None:
        """Raises ValueError unless the arrays, of NumPy, are what `pack` could have made."""
        plan, pattern = self.leaf_plan, self.pattern
        rows, _, kept = _competition(plan)
        block = math.prod(self.taps) * pattern.n
        self.check_values((rows, kept, block) if pattern.uniform else (kept, block))
        indices = self.indices
        if (indices >= plan.inputs).any():
            raise ValueError(f"indices reach beyond {plan.inputs} inputs")
        places = indices.astype(np.int64)
        if self.row_pointers is not None:
            places += plan.inputs * _row_of_each_block(self)
        if (places[..., 1:] <= places[..., :-1]).any():
            raise ValueError("the indices of a row are not ascending")

    @classmethod
    def array_names(cls, leaf_plan: LeafPlan) -> tuple[str, ...]:
        """The fields that hold arrays: no pointers for uniform rows."""
        names = super().array_names(leaf_plan)
        return names[:-1] if _pattern(leaf_plan).uniform else names

    @property
    def pattern(self) -> Block1xN:
        """The weight's pattern."""
        return _pattern(self.leaf_plan)

    @property
    def least_nbytes(self) -> int:
        """Bytes for the values, and log2 of the ways to choose the blocks."""
        self.check_arrays()
        rows, size, kept = _competition(self.leaf_plan)
        bits = math.prod(self.leading) * rows * _log2_choices(size, kept)
        return self.values.size * self.dtype.itemsize + math.ceil(bits / 8)

    @property
    def leading(self) -> Shape:
        """Sizes of the axes of a stack."""
        return self.values.shape[: -3 if self.row_pointers is None else -2]

    @property
    def spans(self) -> tuple[Span, ...]:
        """The axes that blocks use: taps, inputs and outputs."""
        return _spans(self.leaf_plan)

    @property
    def outputs(self) -> int:
        """Number of outputs that the arrays hold."""
        return self._rows * self.pattern.n

    @property
    def _rows(self) -> int:
        pointers = self.row_pointers
        return self.indices.shape[-2] if pointers is None else pointers.shape[-1] - 1


@jax.custom_vjp
def _unpack_weight(packed: PackedBlocks) -> jax.Array:
    bits = as_bits(packed.values)
    bits = _unpack(bits, packed.indices, packed.row_pointers, packed.shape, packed.leaf_plan)
    return from_bits(bits, packed.dtype)


def _unpack_forward(packed: PackedBlocks) -> tuple[jax.Array, PackedBlocks]:
    return _unpack_weight(packed), packed


def _unpack_backward(packed: PackedBlocks, g: jax.Array) -> tuple[PackedBlocks]:
    rows, size, _ = _competition(packed.leaf_plan)
    blocks = _blocks_of(g, packed.leaf_plan)
    blocks = blocks.reshape(*packed.leading, rows, size, blocks.shape[-1])
    places = _places(packed.indices, packed.row_pointers, packed.leaf_plan)
    # The gradient of a kept block is the gradient at its place; dropped ones have none.
    values = jnp.take_along_axis(blocks, places[..., None], axis=-2)
    values = values.reshape(packed.values.shape)
    return (PackedBlocks(values, None, None, packed.leaf_plan),)  # type: ignore[arg-type]


_unpack_weight.defvjp(_unpack_forward, _unpack_backward)


def _row_of_each_block(packed: PackedBlocks) -> np.ndarray:
    """The row of each block, (*stack, kept), after checking the pointers."""
    pointers, *_, kept = np.asarray(packed.row_pointers), *packed.indices.shape
    counts = np.diff(pointers, axis=-1)
    if (counts < 0).any() or (pointers[..., 0] != 0).any() or (pointers[..., -1] != kept).any():
        raise ValueError(f"row pointers do not ascend from 0 to {kept}")
    rows = np.tile(np.arange(counts.shape[-1]), counts.size // max(counts.shape[-1], 1))
    return np.repeat(rows, counts.ravel()).reshape(packed.indices.shape)


@partial(jax.jit, static_argnames="leaf_plan", inline=True)
def _pack(
    bits: jax.Array, mask: jax.Array, nan: jax.Array, leaf_plan: LeafPlan
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Values, indices and row pointers."""
    rows, size, kept = _competition(leaf_plan)
    mask = _blocks_of(mask, leaf_plan)
    blocks = jnp.where(mask, _blocks_of(bits, leaf_plan), 0)
    *stack, _, _, block = blocks.shape
    flags = mask.any(axis=-1).reshape(*stack, rows, size)
    stored = exactly(flags, kept, axis=-1)
    # A stable sort of booleans puts the False ones first, in order.
    places = jnp.argsort(~stored, axis=-1, stable=True)[..., :kept]
    blocks = blocks.reshape(*stack, rows, size, block)
    values = jnp.take_along_axis(blocks, places[..., None], axis=-2)
    too_many = (flags.sum(axis=-1) > kept)[..., None, None]
    values = jnp.where(too_many, nan, values)
    indices = (places % leaf_plan.inputs).astype(index_dtype(leaf_plan.inputs))
    if _pattern(leaf_plan).uniform:
        return values, indices, None
    counts = stored.reshape(*stack, -1, leaf_plan.inputs).sum(axis=-1, dtype=jnp.int32)
    begin = jnp.zeros((*stack, 1), jnp.int32)
    row_pointers = jnp.concatenate([begin, counts.cumsum(axis=-1)], axis=-1)
    return values.squeeze(-3), indices.squeeze(-2), row_pointers


@partial(jax.jit, static_argnames=("shape", "leaf_plan"), inline=True)
def _unpack(
    bits: jax.Array,
    indices: jax.Array,
    row_pointers: jax.Array | None,
    shape: Shape,
    leaf_plan: LeafPlan,
) -> jax.Array:
    """The weight's bits from those of the values."""
    rows, size, kept = _competition(leaf_plan)
    block, stack = bits.shape[-1], indices.shape[: -1 if row_pointers is not None else -2]
    places = _places(indices, row_pointers, leaf_plan)

    # One scatter per set of competing blocks; indices are unique, so XLA need not add them up.
    def place(places: jax.Array, blocks: jax.Array) -> jax.Array:
        return jnp.zeros((size, block), bits.dtype).at[places].set(blocks, unique_indices=True)

    flat = math.prod(stack) * rows
    blocks = jax.vmap(place)(places.reshape(flat, kept), bits.reshape(flat, kept, block))
    return split(_unblocked(blocks.reshape(*stack, -1, block), leaf_plan), shape, _spans(leaf_plan))


def _places(indices: jax.Array, row_pointers: jax.Array | None, leaf_plan: LeafPlan) -> jax.Array:
    """The place of each block among those that it competed with: (*stack, parts, kept)."""
    places = indices.astype(jnp.int32)
    if row_pointers is None:
        return places
    # The row of the i-th block: how many rows begin at or before it. No search, which would gather.
    order = jnp.arange(indices.shape[-1], dtype=jnp.int32).reshape(*[1] * row_pointers.ndim, -1)
    begun = row_pointers[..., 1:, None] <= order
    return (places + begun.sum(axis=-2, dtype=jnp.int32) * leaf_plan.inputs)[..., None, :]


def _blocks_of(x: jax.Array, leaf_plan: LeafPlan) -> jax.Array:
    """(*stack, rows, inputs, block)."""
    return split_blocks(x, _pattern(leaf_plan).n, leaf_plan.axes)


def _unblocked(blocks: jax.Array, leaf_plan: LeafPlan) -> jax.Array:
    """(*stack, taps, inputs, outputs) from blocks (*stack, rows * inputs, block)."""
    n, inputs, outputs = _pattern(leaf_plan).n, leaf_plan.inputs, leaf_plan.outputs
    *stack, _, block = blocks.shape
    apart = blocks.reshape(*stack, outputs // n, inputs, block // n, n).swapaxes(-4, -2)
    return apart.reshape(*stack, block // n, inputs, outputs)


def _competition(leaf_plan: LeafPlan) -> tuple[int, int, int]:
    """How many sets of blocks compete, how many blocks are in each, and how many of them stay."""
    pattern = _pattern(leaf_plan)
    rows, size = leaf_plan.outputs // pattern.n, leaf_plan.inputs
    if not pattern.uniform:
        rows, size = 1, rows * size
    return rows, size, pattern.kept_blocks(size)


def _spans(leaf_plan: LeafPlan) -> tuple[Span, Span, Span]:
    return leaf_plan.tap_axes, leaf_plan.reduction_axes, leaf_plan.output_axes


def _pattern(leaf_plan: LeafPlan) -> Block1xN:
    pattern: Block1xN = PackedBlocks.pattern_of(leaf_plan)
    return pattern


def _log2_choices(size: int, kept: int) -> float:
    """log2 of the number of ways to choose `kept` of `size`."""
    # lgamma does not overflow where the binomial coefficient would.
    natural = math.lgamma(size + 1) - math.lgamma(kept + 1) - math.lgamma(size - kept + 1)
    return natural / math.log(2)
