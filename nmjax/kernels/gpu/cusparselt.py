"""Products with 2:4 weights on NVIDIA's sparse tensor cores, by cuSPARSELt.

A weight is compressed once, on the GPU, into cuSPARSELt's own form, and then multiplied by many
inputs. That form is not ours to read, and belongs to one kind of GPU and one version of cuSPARSELt:
keep packed weights in files, and compress them where they run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.kernels.cpu.ffi import batched, result_like
from nmjax.kernels.gpu.algorithms import Algorithm, Question, known_algorithm, remember_algorithm
from nmjax.kernels.gpu.cusparselt_library import load_cusparselt
from nmjax.kernels.gpu.cusparselt_limits import (
    RESULTS,
    batch_step,
    bias_dtype,
    compressed_bytes,
    compressing_bytes,
    multiplying_bytes,
    searching_bytes,
    why_not_2_4,
    why_not_batch,
    why_not_matrix,
    why_not_result,
)
from nmjax.kernels.gpu.devices import why_no_gpu
from nmjax.kernels.operands import FusedActivation, inputs_of, outputs_of
from nmjax.kernels.reference import dense_weight
from nmjax.kernels.split import split
from nmjax.packed.nm import PackedNM


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
        not traced, has groups of 4 with more than 2 entries; cuSPARSELt or a GPU is not there.
    """
    obstacle = why_not(w.dtype, w.shape, transposed) or _why_not_here(w)
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
        result_like((compressing_bytes(w.shape),), np.dtype(np.uint8), w),
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
    x: jax.Array,
    packed: PackedNM,
    bias: jax.Array | None = None,
    activation: FusedActivation = None,
) -> jax.Array:
    """X (batch, inputs) times a packed leaf, which every call compresses anew; see `prepare`."""
    return matmul(x, prepare(packed), bias, activation)


def matmul(
    x: jax.Array,
    w: Compressed,
    bias: jax.Array | None = None,
    activation: FusedActivation = None,
    *,
    dtype: Any = None,
) -> jax.Array:
    """X (batch, inputs) times a compressed matrix, (batch, outputs); no gradient.

    Args:
      x: of the matrix's dtype; the batch a multiple of 8, of 16 for dtypes of one byte. Sums of
        int8 beyond 2**24 come out as rounded to float32, in which bias and activation are computed.
      w: what `compress` returned.
      bias: (outputs,); rounded to the result's dtype, to float32 if `x` is int8.
      activation: None, `"relu"`, or `"gelu"` in its tanh form, applied after the bias, before the
        result is rounded; GELU for int8 results of int8 and bfloat16 results of float8. NVIDIA does
        not say what its activations make of NaN.
      dtype: of the result; default the first that `RESULTS` names for `x`'s dtype.

    Raises:
      ValueError: shapes, dtypes or the activation do not fit; cuSPARSELt or a GPU is not there.
    """
    result = _checked_result(x, w, bias, activation, dtype)
    return batched(partial(_split, activation, result), x, w, bias)


def tune(
    x: jax.Array,
    w: Compressed,
    bias: jax.Array | None = None,
    activation: FusedActivation = None,
    *,
    dtype: Any = None,
    again: bool = False,
) -> None:
    """Times every kernel that cuSPARSELt has for a product; products traced later take the fastest.

    In this process and, since it is kept on disk, in later ones, which need not search; see
    `nmjax.kernels.gpu.algorithms`. A warning says where it cannot be kept.

    Args:
      x: as for `matmul`; neither it nor the weight may be traced. Where devices share a batch, as
        many rows as one of them has.
      w: as for `matmul`.
      bias: as for `matmul`.
      activation: as for `matmul`.
      dtype: as for `matmul`.
      again: whether to search for products that are known already.

    Raises:
      ValueError: as for `matmul`.
    """
    result = _checked_result(x, w, bias, activation, dtype)
    question = _question(x, w, bias, activation, result)
    if again or known_algorithm(question) is None:
        jax.block_until_ready(jax.jit(partial(_call, "search", activation, result))(x, w, bias))
        remember_algorithm(question, load_cusparselt().found())


def _checked_result(
    x: jax.Array,
    w: Compressed,
    bias: jax.Array | None,
    activation: FusedActivation,
    dtype: Any,
) -> np.dtype:
    """The result's dtype; raises ValueError if cuSPARSELt cannot make the product here."""
    result = np.dtype(dtype or RESULTS.get(str(w.dtype), (w.dtype,))[0])
    obstacle = _why_not_product(x, w, bias, result, activation) or _why_not_here(x, w.data)
    if obstacle:
        raise ValueError(
            f"cuSPARSELt cannot multiply {x.dtype}{x.shape} by {w.dtype}{w.shape}: {obstacle}"
        )
    return result


def _split(
    activation: FusedActivation,
    dtype: np.dtype,
    x: jax.Array,
    w: Compressed,
    bias: jax.Array | None,
) -> jax.Array:
    """The product, of which each device computes some rows with the whole weight."""

    def kernel(x: jax.Array, data: jax.Array, *biases: jax.Array) -> jax.Array:
        part = dataclasses.replace(w, data=data)
        return _call("matmul", activation, dtype, x, part, *(biases or (None,)))

    biases = () if bias is None else (bias,)
    rule = f"b i, c{', o' * len(biases)} -> b o"
    steps = {"b": batch_step(x.dtype)}
    return split(kernel, x, w.data, *biases, rule=rule, whole="o", steps=steps)


def _call(
    handler: str,
    activation: FusedActivation,
    dtype: np.dtype,
    x: jax.Array,
    w: Compressed,
    bias: jax.Array | None,
) -> jax.Array:
    if handler == "search":
        algorithm = _first_choice(searching_bytes(w.shape, x.shape[0], w.outputs))
    else:
        question = _question(x, w, bias, activation, dtype)
        algorithm = known_algorithm(question) or _first_choice(multiplying_bytes(w.shape))
    results = (
        result_like((x.shape[0], w.outputs), dtype, x, w.data),
        result_like((algorithm.workspace,), np.dtype(np.uint8), x, w.data),
    )
    biases = bias_dtype(str(w.dtype), str(dtype))
    y, _ = jax.ffi.ffi_call(f"nmjax_cusparselt_{handler}", results)(
        x,
        w.data,
        jnp.zeros(0, biases) if bias is None else bias.astype(biases),
        transposed=w.transposed,
        activation=activation or "none",
        algorithm=np.array(algorithm[:3], np.int64),
    )
    return y


def _first_choice(workspace: int) -> Algorithm:
    return Algorithm(config=-1, split_k=1, split_k_mode=0, workspace=workspace)


def _question(
    x: jax.Array,
    w: Compressed,
    bias: jax.Array | None,
    activation: FusedActivation,
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


def why_not(dtype: np.dtype, shape: tuple[int, ...], transposed: bool) -> str | None:
    """Why cuSPARSELt does not take a matrix of this dtype and shape here, or None."""
    return load_cusparselt().reason or why_not_matrix(dtype, shape, transposed)


def why_not_packed(packed: PackedNM) -> str | None:
    """Why cuSPARSELt does not take a packed leaf here, or None."""
    return why_not_2_4(packed) or why_not(
        packed.dtype, (inputs_of(packed), outputs_of(packed)), transposed=False
    )


def why_not_product(dtype: np.dtype, batch: int, packed: PackedNM) -> str | None:
    """Why cuSPARSELt does not multiply x of this dtype by a packed leaf here, or None."""
    if dtype != packed.dtype:
        return f"x is {dtype}, the weight {packed.dtype}; both must be the same"
    return why_not_packed(packed) or why_not_batch(dtype, batch)


def _why_not_product(
    x: jax.Array,
    w: Compressed,
    bias: jax.Array | None,
    result: np.dtype,
    activation: str | None,
) -> str | None:
    if load_cusparselt().reason:
        return load_cusparselt().reason
    if x.ndim != 2 or x.shape[1] != w.inputs:
        return f"x should be (batch, {w.inputs})"
    if x.dtype != w.dtype:
        return "both must have the same dtype"
    if bias is not None and bias.shape != (w.outputs,):
        return f"the bias has shape {bias.shape}, expected ({w.outputs},)"
    return why_not_result(w.dtype, result, activation) or why_not_batch(x.dtype, x.shape[0])


def _why_not_here(*operands: jax.Array) -> str | None:
    """Why the device has no kernel for operands that are multiplied at once, or None."""
    if any(isinstance(operand, jax.core.Tracer) for operand in operands):
        return None  # Traced for any device; XLA says so where it has no such call.
    return why_no_gpu(operands[0].dtype)


def _check_2_4(w: jax.Array, transposed: bool) -> None:
    along = w if transposed else w.T
    entries = (along.reshape(along.shape[0], -1, 4) != 0).sum(axis=-1)
    misfits = int((entries > 2).sum())
    if misfits:
        raise ValueError(
            f"{misfits:,} groups of 4 of {w.dtype}{w.shape} have more than 2 entries along axis "
            f"{-1 if transposed else -2}; prune it first, with nmjax.nm_mask or nmjax.prune"
        )
