"""Packed weights in the layouts of other libraries: NVIDIA's 2:4 pair, and BSR.

The arrays are NumPy's, for one matrix at a time in the layout (outputs, inputs) that PyTorch and
SciPy use. Take a stack of layers apart first: `jax.tree.map(lambda x: x[0], packed)`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nmjax.layouts import Shape
from nmjax.packed.blocks import PackedBlocks
from nmjax.packed.nm import PackedNM
from nmjax.patterns import NM
from nmjax.trees.spans import merge

# Rows and columns of a matrix that the metadata of 16-bit weights come in.
_META_ROWS, _META_COLUMNS = 32, 32


class SemiStructured(NamedTuple):
    """A 2:4 matrix as CUTLASS, and PyTorch's `SparseSemiStructuredTensorCUTLASS`, hold it.

    Attributes:
      values: (outputs, inputs / 2), float16 or bfloat16.
      meta: int16 (outputs, inputs / 16), positions of the values, in the order that sparse tensor
        cores of the Ampere generation read.
    """

    values: np.ndarray
    meta: np.ndarray


class BSR(NamedTuple):
    """A matrix in block compressed sparse rows, as SciPy and PyTorch take it.

    `scipy.sparse.bsr_matrix((data, indices, indptr), shape)`;
    `torch.sparse_bsr_tensor(indptr, indices, data, shape)` with each array as a tensor.

    Attributes:
      data: (blocks, N, taps).
      indices: int32 (blocks,), the column of each block: its input channel.
      indptr: int32 (outputs / N + 1,), where each row of blocks begins.
      shape: of the matrix, (outputs, inputs * taps), a convolution kernel OIHW as (O, IHW).
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    shape: Shape


def to_semi_structured(packed: PackedNM) -> SemiStructured:
    """A 2:4 matrix as the pair of values and CUTLASS metadata.

    A group with fewer than two non-zero weights is filled up with its third, then its fourth
    weight, as PyTorch does, so that the pair is the same bit for bit.

    Args:
      packed: 2:4, one matrix, float16 or bfloat16, with outputs and inputs that 32 divides.

    Raises:
      TypeError: `packed` is no `PackedNM`.
      ValueError: it has another pattern, dtype or shape.

    Source: `torch/sparse/_semi_structured_conversions.py` and CUTLASS's `host_reorder.h`.

    Example:
      `SparseSemiStructuredTensorCUTLASS(shape, values, meta, None, None, None)` in PyTorch, where
      bfloat16 values travel as integers: `torch.from_numpy(values.view("int16")).view(
      torch.bfloat16)`.
    """
    if not isinstance(packed, PackedNM):
        raise TypeError(f"semi-structured weights are made of a PackedNM, got {type(packed)}")
    plan = packed.leaf_plan
    if plan.pattern not in (NM(2, 4), NM(2, 4, flatten="kernel")):
        raise ValueError(f"semi-structured weights are 2:4, got {plan.pattern}")
    if packed.dtype.itemsize != 2:
        raise ValueError(f"semi-structured weights have 16 bits here, got {packed.dtype}")
    if packed.values.ndim != 3:
        raise ValueError(f"needs one matrix, got a stack of them: a weight of shape {packed.shape}")
    if plan.outputs % _META_ROWS or plan.inputs % _META_COLUMNS:
        raise ValueError(
            f"the metadata need outputs and inputs that {_META_ROWS} divides, got {plan.outputs} "
            f"outputs and {plan.inputs} inputs; pad the layer, or store it as dense zeros"
        )
    spans = (plan.output_axes, plan.reduction_axes)
    groups = merge(np.asarray(packed.unpack()), spans).reshape(plan.outputs, -1, 4)
    stored = groups != 0
    for position in (2, 3):
        stored[..., position] |= stored.sum(axis=-1) < 2
    first, second = stored.nonzero()[-1].reshape(plan.outputs, -1, 2).transpose(2, 0, 1)
    nibbles = (first | second << 2).reshape(plan.outputs, -1, 4)
    words = (nibbles << np.array([0, 4, 8, 12])).sum(axis=-1)
    values = groups[stored].reshape(plan.outputs, -1)
    return SemiStructured(values, _reordered(words).astype(np.uint16).view(np.int16))


def to_bsr(packed: PackedBlocks) -> BSR:
    """A 1xN weight as BSR, with blocks of N outputs by one input with its taps.

    Args:
      packed: one matrix or convolution kernel, uniform or not.

    Raises:
      TypeError: `packed` is no `PackedBlocks`.
      ValueError: it is a stack of weights.
    """
    if not isinstance(packed, PackedBlocks):
        raise TypeError(f"BSR is made of a PackedBlocks, got {type(packed)}")
    plan, uniform = packed.leaf_plan, packed.row_pointers is None
    if packed.indices.ndim != (2 if uniform else 1):
        raise ValueError(f"needs one weight, got a stack of them, of shape {packed.shape}")
    taps = math.prod(plan.shape[axis] for axis in plan.tap_axes)
    values, indices = np.asarray(packed.values), np.asarray(packed.indices, np.int32)
    if packed.row_pointers is None:
        indptr = np.arange(len(indices) + 1, dtype=np.int32) * indices.shape[1]
    else:
        indptr = np.asarray(packed.row_pointers)
    block = values.shape[-1]
    data = values.reshape(-1, taps, block // taps).swapaxes(-2, -1)
    shape = (plan.outputs, plan.inputs * taps)
    return BSR(np.ascontiguousarray(data), indices.ravel(), indptr.astype(np.int32), shape)


def _reordered(words: np.ndarray) -> np.ndarray:
    """Metadata words (rows, columns) in the order of sparse tensor cores, of the same shape."""
    rows, columns = np.indices(words.shape)
    # Rows of 8 are dealt out in turn, each 2 x 2 square is transposed, and pairs of columns lie
    # one behind the other.
    to_rows = rows // 32 * 32 + rows % 8 * 4 + rows % 32 // 8
    swap = (columns % 2) - (to_rows % 2)
    to_rows, to_columns = to_rows + swap, columns - swap
    reordered = np.empty_like(words)
    places = to_columns // 2 * 2 * len(words) + to_rows * 2 + to_columns % 2
    reordered.ravel()[places] = words
    return reordered
