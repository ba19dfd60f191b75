"""Converts packed weights to the layouts of other libraries: NVIDIA's 2:4 pair, and BSR.

The functions return NumPy arrays for one matrix, in the layout (outputs, inputs) of PyTorch and
SciPy. To convert a stack of layers, take one at a time: `jax.tree.map(lambda x: x[0], packed)`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nmjax.layouts.axes import Shape
from nmjax.packed.blocks import PackedBlocks
from nmjax.packed.nm import PackedNM
from nmjax.patterns import NM
from nmjax.trees.spans import merge

# The metadata of 16-bit weights covers tiles with this many rows and columns of the matrix.
_META_ROWS, _META_COLUMNS = 32, 32


class SemiStructured(NamedTuple):
    """A 2:4 matrix in the format of CUTLASS and PyTorch's `SparseSemiStructuredTensorCUTLASS`.

    Attributes:
      values: (outputs, inputs / 2), float16 or bfloat16.
      meta: int16 (outputs, inputs / 16), positions of the values, in the order in which Ampere's
        sparse tensor cores read them.
    """

    values: np.ndarray
    meta: np.ndarray


class BSR(NamedTuple):
    """A matrix in block compressed sparse rows, the BSR format of SciPy and PyTorch.

    Use `scipy.sparse.bsr_matrix((data, indices, indptr), shape)`, or
    `torch.sparse_bsr_tensor(indptr, indices, data, shape)` with each array as a tensor.

    Attributes:
      data: (blocks, N, taps).
      indices: int32 (blocks,), the column of each block, which is its input channel.
      indptr: int32 (outputs / N + 1,), where each row of blocks begins.
      shape: (outputs, inputs * taps); a convolution kernel OIHW becomes (O, IHW).
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    shape: Shape


def to_semi_structured(packed: PackedNM) -> SemiStructured:
    """Converts a 2:4 matrix to the pair of values and CUTLASS metadata.

    Every group stores two weights. If fewer are nonzero, the third and then the fourth weight take
    the free places, as in PyTorch, so that the pair equals PyTorch's bit for bit.

    Args:
      packed: one 2:4 matrix of float16 or bfloat16 whose outputs and inputs are multiples of 32.

    Raises:
      TypeError: `packed` is not a `PackedNM`.
      ValueError: it has another pattern, dtype or shape.

    Source: `torch/sparse/_semi_structured_conversions.py` and CUTLASS's `host_reorder.h`.

    Example:
      In PyTorch, `SparseSemiStructuredTensorCUTLASS(shape, values, meta, None, None, None)`.
      Convert bfloat16 values as integers: `torch.from_numpy(values.view("int16")).view(
      torch.bfloat16)`.
    """
    if not isinstance(packed, PackedNM):
        raise TypeError(f"expected a PackedNM, got {type(packed)}")
    plan = packed.leaf_plan
    packed.pattern.check_consecutive("the semi-structured layout")
    if plan.pattern not in (NM(2, 4), NM(2, 4, flatten="kernel")):
        raise ValueError(f"semi-structured weights must be 2:4, got {plan.pattern}")
    if packed.dtype.itemsize != 2:
        raise ValueError(f"semi-structured weights must have 16 bits, got {packed.dtype}")
    if packed.values.ndim != 3:
        raise ValueError(f"expected one matrix, got a stack of shape {packed.shape}")
    if plan.outputs % _META_ROWS or plan.inputs % _META_COLUMNS:
        raise ValueError(
            f"outputs and inputs must be multiples of {_META_ROWS}, got {plan.outputs} outputs and "
            f"{plan.inputs} inputs; pad the layer, or store it dense"
        )
    spans = (plan.output_axes, plan.reduction_axes)
    groups = merge(np.asarray(packed.unpack()), spans).reshape(plan.outputs, -1, 4)
    stored = groups != 0
    for position in (2, 3):
        stored[..., position] |= stored.sum(axis=-1) < 2
    first, second = stored.nonzero()[-1].reshape(plan.outputs, -1, 2).transpose(2, 0, 1)
    # Two positions of two bits each describe a group, and four groups fill a word of 16 bits.
    nibbles = (first | second << 2).reshape(plan.outputs, -1, 4)
    # The first of the four groups is in the lowest bits.
    words = (nibbles << np.array([0, 4, 8, 12])).sum(axis=-1)
    values = groups[stored].reshape(plan.outputs, -1)
    return SemiStructured(values, _reordered(words).astype(np.uint16).view(np.int16))


def to_bsr(packed: PackedBlocks) -> BSR:
    """Converts a 1xN weight to BSR. A block has N outputs and one input with all its taps.

    Args:
      packed: one matrix or convolution kernel, uniform or not.

    Raises:
      TypeError: `packed` is not a `PackedBlocks`.
      ValueError: it is a stack of weights.
    """
    if not isinstance(packed, PackedBlocks):
        raise TypeError(f"expected a PackedBlocks, got {type(packed)}")
    plan = packed.leaf_plan
    if packed.leading:
        raise ValueError(f"expected one weight, got a stack of shape {packed.shape}")
    taps = math.prod(plan.shape[axis] for axis in plan.tap_axes)
    values, indices = np.asarray(packed.values), np.asarray(packed.indices, np.int32)
    if packed.row_pointers is None:
        # Uniform rows hold equally many blocks, so their pointers are not stored.
        indptr = np.arange(len(indices) + 1, dtype=np.int32) * indices.shape[1]
    else:
        indptr = np.asarray(packed.row_pointers)
    block = values.shape[-1]
    # A packed block goes tap by tap, and the rows of a BSR block are outputs.
    data = values.reshape(-1, taps, block // taps).swapaxes(-2, -1)
    shape = (plan.outputs, plan.inputs * taps)
    return BSR(np.ascontiguousarray(data), indices.ravel(), indptr.astype(np.int32), shape)


def _reordered(words: np.ndarray) -> np.ndarray:
    """Puts metadata words (rows, columns) into the order in which sparse tensor cores read them."""
    rows, columns = np.indices(words.shape)
    # Within 32 rows, row 8 * i + j moves to row 4 * j + i. Then the off-diagonal words of each
    # 2 x 2 square swap places. Memory holds one pair of columns after the other.
    to_rows = rows // 32 * 32 + rows % 8 * 4 + rows % 32 // 8
    swap = (columns % 2) - (to_rows % 2)
    to_rows, to_columns = to_rows + swap, columns - swap
    reordered = np.empty_like(words)
    places = to_columns // 2 * 2 * len(words) + to_rows * 2 + to_columns % 2
    reordered.ravel()[places] = words
    return reordered
