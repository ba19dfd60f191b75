"""Products with 2:4 weights on NVIDIA's sparse tensor cores, by cuSPARSELt.

A weight is compressed once, on the GPU, into cuSPARSELt's own form, and then multiplied by many
inputs. That form is not ours to read, and belongs to one kind of GPU and one version of cuSPARSELt:
keep packed weights in files, and compress them where they run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.kernels.algorithms import Algorithm, Question, known_algorithm, remember_algorithm
from nmjax.kernels.cusparselt_library import load_cusparselt
from nmjax.kernels.ffi import batched, result_like
from nmjax.kernels.operands import Activation, Packed, inputs_of, kernel_taps, outputs_of
from nmjax.kernels.reference import dense_weight
from nmjax.packed_nm import PackedNM
from nmjax.patterns import NM, Pattern

# What cuSPARSELt multiplies, and the dtypes of the product; the first is the default.
RESULTS: dict[str, tuple[str, ...]] = {
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
    "int8": ("int32", "float16", "bfloat16", "int8"),
    "float8_e4m3fn": ("bfloat16", "float16", "float32"),
}
WORKSPACE = 32 * 2**20  # Bytes of XLA's memory, while a product runs that is not tuned.
_FIRST_CHOICE = Algorithm(config=-1, split_k=1, split_k_mode=0, workspace=WORKSPACE)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["data"],
    meta_fields=["shape", "transposed", "dtype"],
)
@dataclass(frozen=True, eq=False)
class Compressed:
    """A 2:4 matrix in cuSPARSELt's form; a pytree node of one array.

    Attributes:
      data: uint8 (bytes,), for cuSPARSELt alone.
      shape: (rows, columns) of the matrix; static.
      transposed: whether `matmul` multiplies by the transposed matrix; static.
      dtype: of the matrix; static.
    """

    data: jax.Array
    shape: tuple[int, int]
    transposed: bool
    dtype: np.dtype

    @property
    def inputs(self) -> int:
        """Size of the axis that a product sums over, along which the matrix is 2:4."""
        return self.shape[self.transposed]

    @property
    def outputs(self) -> int:
        """Size of the other axis."""
        return self.shape[not self.transposed]


def compress(w: jax.Array, *, transposed: bool = False) -> Compressed:
    """Compresses a matrix that is 2:4 along the axis a product sums over.

    Args:
      w: (inputs, outputs), or (outputs, inputs) if `transposed`; a dtype of `RESULTS`, both sizes
        multiples of 16, of 32 for dtypes of one byte. Those have to be transposed.
      transposed: whether products are `x @ w.T` rather than `x @ w`.

    Raises:
      ValueError: a shape, a dtype or a place in memory that cuSPARSELt does not take; `w`, if it is
        not traced, has groups of 4 with more than 2 entries; cuSPARSELt is not there.
    """
    obstacle = why_not(w.dtype, w.shape, transposed)
    if obstacle:
        raise ValueError(f"cuSPARSELt cannot compress {w.dtype}{w.shape}: {obstacle}")
    if not isinstance(w, jax.core.Tracer):
        _check_2_4(w, transposed)
    return compress_unchecked(w, transposed)


def compress_unchecked(w: jax.Array, transposed: bool) -> Compressed:
    """As `compress`, of a matrix that is known to be 2:4 and of a shape that fits."""
    rows, columns = w.shape
    results = (
        result_like((compressed_bytes(w.shape, w.dtype),), np.dtype(np.uint8), w),
        result_like((WORKSPACE,), np.dtype(np.uint8), w),
    )
    call = jax.ffi.ffi_call("nmjax_cusparselt_compress", results)
    data, _ = call(w, transposed=transposed)
    return Compressed(data, (rows, columns), transposed, np.dtype(w.dtype))


def prepare(packed: PackedNM) -> Compressed:
    """Compresses one packed leaf, for as many products as follow.

    Args:
      packed: an N:M matrix that is 2:4 as well: 2:4 itself, 1:4, 2:8, 1:2 and sparser.

    Raises:
      ValueError: the leaf is not 2:4, not one matrix, or of a shape or dtype that cuSPARSELt does
        not take; cuSPARSELt is not there.
    """
    obstacle = why_not_packed(packed)
    if obstacle:
        raise ValueError(f"cuSPARSELt cannot take the weight {packed.shape}: {obstacle}")
    return compress_unchecked(dense_weight(packed), transposed=False)


def packed_matmul(
    x: jax.Array, packed: PackedNM, bias: jax.Array | None = None, activation: Activation = None
) -> jax.Array:
    """X (batch, inputs) times a packed leaf, which every call compresses anew; see `prepare`."""
    return matmul(x, prepare(packed), bias, activation)


def matmul(
    x: jax.Array,
    w: Compressed,
    bias: jax.Array | None = None,
    activation: Activation = None,
    *,
    dtype: Any = None,
) -> jax.Array:
    """X (batch, inputs) times a compressed matrix, (batch, outputs); no gradient.

    Args:
      x: of the matrix's dtype; the batch a multiple of 8, of 16 for dtypes of one byte.
      w: what `compress` returned.
      bias: (outputs,), for floating results; rounded to the result's dtype.
      activation: None or `"relu"`, applied after the bias, before the result is rounded.
      dtype: of the result; default the first that `RESULTS` names for `x`'s dtype.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    result = np.dtype(dtype or RESULTS.get(str(w.dtype), (w.dtype,))[0])
    obstacle = _why_not_product(x, w, result)
    if obstacle:
        raise ValueError(
            f"cuSPARSELt cannot multiply {x.dtype}{x.shape} by {w.dtype}{w.shape}: {obstacle}"
        )
    return batched(partial(_call, "matmul", activation, result), x, w, bias)


def tune(x: jax.Array, w: Compressed, bias: jax.Array | None = None, **settings: Any) -> None:
    """Times every kernel that cuSPARSELt has for a product; products traced later take the fastest.

    In this process and, since it is kept on disk, in later ones; see `nmjax.kernels.algorithms`.

    Args:
      x: as for `matmul`; neither it nor the weight may be traced.
      w: as for `matmul`.
      bias: as for `matmul`.
      **settings: `activation` and `dtype`, as for `matmul`.
    """
    activation = settings.get("activation")
    result = np.dtype(settings.get("dtype") or RESULTS[str(w.dtype)][0])
    jax.block_until_ready(jax.jit(partial(_call, "search", activation, result))(x, w, bias))
    question = _question(x, w, bias, activation, result)
    remember_algorithm(question, load_cusparselt().found())


def _call(
    handler: str,
    activation: Activation,
    dtype: np.dtype,
    x: jax.Array,
    w: Compressed,
    bias: jax.Array | None,
) -> jax.Array:
    algorithm = _FIRST_CHOICE
    if handler == "matmul":
        algorithm = known_algorithm(_question(x, w, bias, activation, dtype)) or algorithm
    results = (
        result_like((x.shape[0], w.outputs), dtype, x, w.data),
        result_like((algorithm.workspace,), np.dtype(np.uint8), x, w.data),
    )
    y, _ = jax.ffi.ffi_call(f"nmjax_cusparselt_{handler}", results)(
        x,
        w.data,
        jnp.zeros(0, dtype) if bias is None else bias.astype(dtype),
        transposed=w.transposed,
        relu=activation == "relu",
        algorithm=np.array(algorithm[:3], np.int64),
    )
    return y


def _question(
    x: jax.Array,
    w: Compressed,
    bias: jax.Array | None,
    activation: Activation,
    dtype: np.dtype,
) -> Question:
    return Question(
        version=str(load_cusparselt().version),
        shape=(x.shape[0], *w.shape),
        transposed=w.transposed,
        dtypes=(str(w.dtype), str(dtype)),
        bias=bias is not None,
        activation=activation,
    )


def compressed_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Room for a compressed matrix: half of it, two bits for each value kept, and some to spare.

    cuSPARSELt tells the exact size only where there is a GPU, which compiling for one does without;
    a matrix that needs more is an error when it is compressed.
    """
    rows, columns = (math.ceil(size / 256) * 256 for size in shape)
    return rows * columns // 2 * dtype.itemsize + rows * columns // 8 + 4096


def why_not(dtype: np.dtype, shape: tuple[int, ...], transposed: bool) -> str | None:
    """Why cuSPARSELt does not take a matrix of this dtype and shape here, or None."""
    obstacle = load_cusparselt().reason
    if obstacle:
        return obstacle
    dtype = np.dtype(dtype)
    if str(dtype) not in RESULTS:
        return f"it takes {', '.join(RESULTS)}"
    if len(shape) != 2:
        return "it takes one matrix"
    step = 32 // min(dtype.itemsize, 2)
    if any(size % step for size in shape):
        return f"it takes sizes that are multiples of {step}"
    if dtype.itemsize == 1 and not transposed:
        return "it takes matrices of one-byte numbers only as (outputs, inputs): transposed=True"
    return None


def why_not_packed(packed: PackedNM) -> str | None:
    """Why cuSPARSELt does not take a packed leaf here, or None."""
    return why_not_2_4(packed) or why_not(packed.dtype, _matrix_shape(packed), transposed=False)


def why_not_2_4(packed: Packed) -> str | None:
    """Why no machine's sparse tensor cores multiply by a packed leaf of 16-bit numbers, or None."""
    pattern = packed.leaf_plan.pattern
    if not isinstance(packed, PackedNM) or not is_2_4(pattern):
        return f"groups of 4 can have more than 2 entries in {pattern}"
    if kernel_taps(packed) or packed.values.ndim != 3:
        return "it takes one matrix; map over a stack of layers, and convolutions stay packed"
    if any(size % 16 for size in _matrix_shape(packed)):
        return "it takes sizes that are multiples of 16"
    return None


def _matrix_shape(packed: PackedNM) -> tuple[int, int]:
    return inputs_of(packed), outputs_of(packed)


def why_not_product(dtype: np.dtype, batch: int, packed: PackedNM) -> str | None:
    """Why cuSPARSELt does not multiply x of this dtype by a packed leaf here, or None."""
    if dtype != packed.dtype:
        return f"x is {dtype}, the weight {packed.dtype}; both must be the same"
    return why_not_packed(packed) or why_not_batch(dtype, batch)


def why_not_batch(dtype: np.dtype, batch: int) -> str | None:
    """Why cuSPARSELt does not take so many rows of an input, or None."""
    step = 16 // min(np.dtype(dtype).itemsize, 2)
    return f"the batch must be a multiple of {step}, not {batch}; pad it" if batch % step else None


def is_2_4(pattern: Pattern) -> bool:
    """Whether every weight of a pattern has at most 2 entries in each aligned group of 4."""
    if not isinstance(pattern, NM):
        return False
    if pattern.m % 4 == 0:
        return pattern.n <= 2
    return pattern == NM(1, 2)


def _why_not_product(x: jax.Array, w: Compressed, result: np.dtype) -> str | None:
    if load_cusparselt().reason:
        return load_cusparselt().reason
    if x.ndim != 2 or x.shape[1] != w.inputs:
        return f"x should be (batch, {w.inputs})"
    if x.dtype != w.dtype:
        return "both must have the same dtype"
    if str(result) not in RESULTS[str(w.dtype)]:
        return f"results can be {', '.join(RESULTS[str(w.dtype)])}, not {result}"
    return why_not_batch(x.dtype, x.shape[0])


def _check_2_4(w: jax.Array, transposed: bool) -> None:
    along = w if transposed else w.T
    entries = (along.reshape(along.shape[0], -1, 4) != 0).sum(axis=-1)
    misfits = int((entries > 2).sum())
    if misfits:
        raise ValueError(
            f"{misfits:,} groups of 4 of {w.dtype}{w.shape} have more than 2 entries along axis "
            f"{-1 if transposed else -2}; prune it first, with nmjax.nm_mask or nmjax.prune"
        )
