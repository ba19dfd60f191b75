"""Products with 2:4 weights on NVIDIA's sparse tensor cores, by cuSPARSELt.

A weight is compressed once, on the GPU, into cuSPARSELt's own form, and then multiplied by many
inputs. Only cuSPARSELt reads that form, and it depends on the kind of GPU and the version of
cuSPARSELt. So keep packed weights in files, and compress them where they run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.kernels.calls import batched, result_like
from nmjax.kernels.gpu.algorithms import Algorithm, Question, known_algorithm, remember_algorithm
from nmjax.kernels.gpu.cusparselt_library import load_cusparselt
from nmjax.kernels.gpu.cusparselt_limits import (
    RESULTS,
    batch_step,
    bias_dtype,
    check_batch,
    check_matrix,
    check_result,
    compressed_bytes,
    compressing_bytes,
    multiplying_bytes,
    searching_bytes,
)
from nmjax.kernels.gpu.devices import check_gpu
from nmjax.kernels.operands import FusedActivation
from nmjax.kernels.split import split
from nmjax.packed.nm import PackedNM
from nmjax.packed.weight import Packed


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["data"],
    meta_fields=["shape", "transposed", "dtype"],
)
@dataclass(frozen=True, eq=False)
class Compressed:
    """A 2:4 matrix in cuSPARSELt's form; a pytree node of one array.

    Attributes:
      data: uint8 (bytes,), in cuSPARSELt's private format.
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
      NotImplementedError: cuSPARSELt or a GPU is missing, or does not take the shape or dtype.
      ValueError: `w`, if it is not traced, has groups of 4 with more than 2 entries.
    """
    with _explained(f"compress {w.dtype}{w.shape}"):
        check_library()
        check_matrix(w.dtype, w.shape, transposed)
        _check_device(w)
    if not isinstance(w, jax.core.Tracer):
        _check_2_4(w, transposed)
    return compress_unchecked(w, transposed)


def compress_unchecked(w: jax.Array, transposed: bool) -> Compressed:
    """Like `compress`, for a matrix that is known to be 2:4 and to have a shape that fits."""
    rows, columns = w.shape
    results = (
        result_like((compressed_bytes(w.shape, w.dtype),), np.dtype(np.uint8), w),
        result_like((compressing_bytes(w.shape),), np.dtype(np.uint8), w),
    )
    # Scratch memory is a result too: a CUDA graph is replayed after the call has returned.
    call = jax.ffi.ffi_call("nmjax_cusparselt_compress", results)
    data, _ = call(w, transposed=transposed)
    return Compressed(data, (rows, columns), transposed, np.dtype(w.dtype))


def prepare(packed: PackedNM) -> Compressed:
    """Compresses one packed leaf, for any number of products.

    Args:
      packed: an N:M matrix that is 2:4 as well: 2:4 itself, 1:4, 2:8, 1:2 and sparser.

    Raises:
      NotImplementedError: the leaf is not 2:4 or not one matrix, cuSPARSELt does not take its shape
        or dtype, or cuSPARSELt is missing.
    """
    with _explained(f"take the weight {packed.shape}"):
        _check_packed(packed)
    return compress_unchecked(packed.dense_matrices(), transposed=False)


def packed_matmul(
    x: jax.Array,
    packed: PackedNM,
    bias: jax.Array | None = None,
    activation: FusedActivation = None,
) -> jax.Array:
    """Multiplies x (batch, inputs) by a packed leaf, compressing it in each call; see `prepare`."""
    return matmul(x, prepare(packed), bias, activation)


def matmul(
    x: jax.Array,
    w: Compressed,
    bias: jax.Array | None = None,
    activation: FusedActivation = None,
    *,
    dtype: Any = None,
) -> jax.Array:
    """Multiplies x (batch, inputs) by a compressed matrix: (batch, outputs). There is no gradient.

    Args:
      x: of the matrix's dtype; the batch a multiple of 8, of 16 for dtypes of one byte. int8
        sums beyond 2**24 are rounded to float32, the dtype used for bias and activation.
      w: what `compress` returned.
      bias: (outputs,); rounded to the result's dtype, to float32 if `x` is int8.
      activation: None, `"relu"`, or `"gelu"` in its tanh form, applied after the bias, before the
        result is rounded; GELU for int8 results of int8 and bfloat16 results of float8. NVIDIA does
        not document how its activations treat NaN.
      dtype: of the result; default the first that `RESULTS` names for `x`'s dtype.

    Raises:
      ValueError: shapes or dtypes do not fit; an unknown activation.
      NotImplementedError: cuSPARSELt or a GPU is missing, or does not compute this product.
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
    """Times every kernel that cuSPARSELt has for a product; products traced later use the fastest.

    The result is kept on disk (`nmjax.kernels.gpu.algorithms`), so later processes use it too. If
    it cannot be kept, a warning says so.

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
    # The kernel found is read at trace time, so products traced earlier keep theirs.
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
    """The result's dtype; raises if the product is wrong, or cuSPARSELt cannot compute it here."""
    result = np.dtype(dtype or RESULTS.get(str(w.dtype), (w.dtype,))[0])
    what = f"multiply {x.dtype}{x.shape} by {w.dtype}{w.shape}"
    _check_shapes(x, w, bias, what)
    with _explained(what):
        check_library()
        check_result(w.dtype, result, activation)
        check_batch(x.dtype, x.shape[0])
        _check_device(x, w.data)
    return result


def _split(
    activation: FusedActivation,
    dtype: np.dtype,
    x: jax.Array,
    w: Compressed,
    bias: jax.Array | None,
) -> jax.Array:
    """The product; each device computes some rows with the whole weight."""
    structure = jax.tree.structure(w)

    def kernel(x: jax.Array, data: jax.Array, *biases: jax.Array) -> jax.Array:
        part = jax.tree.unflatten(structure, [data])
        return _call("matmul", activation, dtype, x, part, *(biases or (None,)))

    # Devices split the rows of x. The compressed weight cannot be cut, so each has all of it.
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
    # XLA's FFI has no optional operands: an empty array stands for a missing bias.
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


def check(dtype: np.dtype, packed: Packed, rows: int) -> None:
    """Raises NotImplementedError unless cuSPARSELt multiplies x of this dtype by a packed leaf."""
    if dtype != packed.dtype:
        raise NotImplementedError(
            f"x is {dtype}, the weight {packed.dtype}; both must have the same dtype"
        )
    _check_packed(packed)
    check_batch(dtype, rows)


def check_semi_structured(packed: Packed) -> None:
    """Raises NotImplementedError for a weight of 16-bit numbers that sparse tensor cores reject."""
    pattern = packed.pattern
    if not pattern.is_semi_structured:
        raise NotImplementedError(f"groups of 4 can have more than 2 entries in {pattern}")
    if packed.kernel_taps or packed.values.ndim != 3:
        raise NotImplementedError(
            "it takes one matrix; map over a stack of layers, and convolutions stay packed"
        )
    if any(size % 16 for size in (packed.inputs, packed.outputs)):
        raise NotImplementedError("it takes sizes that are multiples of 16")


def check_library() -> None:
    """Raises NotImplementedError if cuSPARSELt or our calls of it are not loaded."""
    if reason := load_cusparselt().reason:
        raise NotImplementedError(reason)


def _check_packed(packed: Packed) -> None:
    check_semi_structured(packed)
    check_library()
    check_matrix(packed.dtype, (packed.inputs, packed.outputs), transposed=False)


def _check_shapes(x: jax.Array, w: Compressed, bias: jax.Array | None, what: str) -> None:
    """Raises ValueError for operands that no backend could multiply."""
    if x.ndim != 2 or x.shape[1] != w.inputs:
        raise ValueError(f"cannot {what}: x should be (batch, {w.inputs})")
    if x.dtype != w.dtype:
        raise ValueError(f"cannot {what}: both must have the same dtype")
    if bias is not None and bias.shape != (w.outputs,):
        raise ValueError(f"cannot {what}: the bias has shape {bias.shape}, expected ({w.outputs},)")


def _check_device(*operands: jax.Array) -> None:
    """Raises NotImplementedError if JAX's device cannot run a product of these operands now."""
    # Traced operands may be lowered for any device; XLA raises for one without such a call.
    if not any(isinstance(operand, jax.core.Tracer) for operand in operands):
        check_gpu(operands[0].dtype)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Adds what cuSPARSELt was to do to the reason why it cannot."""
    try:
        yield
    except NotImplementedError as reason:
        raise NotImplementedError(f"cuSPARSELt cannot {what}: {reason}") from None


def _check_2_4(w: jax.Array, transposed: bool) -> None:
    along = w if transposed else w.T
    entries = (along.reshape(along.shape[0], -1, 4) != 0).sum(axis=-1)
    misfits = int((entries > 2).sum())
    if misfits:
        raise ValueError(
            f"{misfits:,} groups of 4 of {w.dtype}{w.shape} have more than 2 entries along axis "
            f"{-1 if transposed else -2}; prune it first, with nmjax.nm_mask or nmjax.prune"
        )
