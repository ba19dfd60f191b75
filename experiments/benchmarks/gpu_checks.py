"""Checks every GPU kernel against float64, on random numbers.

The error is the Euclidean norm of the difference over that of the true product. Both sides use the
same rounded operands, so it measures only sums and the rounding of results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import nmjax
from experiments.benchmarks.gpu_products import numbers, pruned
from nmjax.kernels.gpu import cusparselt, decode
from nmjax.kernels.gpu.cusparselt_limits import GELU, RESULTS
from nmjax.masks.transposable import transposable_mask
from nmjax.packed.quantized import Quantized

# Rounding to bfloat16 alone gives an error of about 0.0017, to float16 0.0002; sums of integers are
# exact. Tensor cores keep fewer bits of float8 sums than float32 has.
LIMITS = {"bfloat16": 4e-3, "float16": 5e-4, "int8": 0.0, "int32": 0.0, "float32": 1e-5}
FLOAT8_LIMIT = 1e-2
# cuSPARSELt's GELU is of float32, as the hardware approximates it, and then rounded.
GELU_LIMIT = 1e-2
SHAPES = ((8, 64, 32), (16, 1024, 256), (512, 2048, 4096))
# Each takes another variant of the kernel for few rows, or fills it otherwise.
ROWS_AND_VECTORS: tuple[tuple[int, Literal[0, 2, 4, 8]], ...] = (
    *((1, 0), (5, 2), (8, 8), (13, 4), (16, 8)),
    *((29, 8), (37, 4), (64, 2), (64, 8), (70, 8)),
)


def check_cusparselt(dtype: str, transposed: bool) -> Iterator[dict[str, Any]]:
    """Compress and multiply: every dtype of results, with and without bias and activations."""
    name = f"cusparselt{', transposed' if transposed else ''}"
    multiply = jax.jit(cusparselt.matmul, static_argnames=("activation", "dtype"))
    for rows, inputs, outputs in SHAPES:
        is_byte = jnp.dtype(dtype).itemsize == 1
        x = numbers((max(rows, 16) if is_byte else rows, inputs), dtype, 0)
        w = pruned(numbers((inputs, outputs), dtype, 1), -2)
        compressed = cusparselt.compress(w.T if transposed else w, transposed=transposed)
        exact = _exact(x, w)
        bias = jnp.round(8 * numbers((outputs,), "float32", 2))  # Whole, as sums of integers are.
        for result in RESULTS[dtype]:
            y = multiply(x, compressed, dtype=result)
            yield _row(f"{name}", x, w, y, exact)
            with_bias = exact + np.asarray(bias, np.float64)
            y = multiply(x, compressed, bias, activation="relu", dtype=result)
            yield _row(f"{name}, bias and ReLU", x, w, y, np.maximum(with_bias, 0))
            if result in GELU.get(dtype, ()):
                y = multiply(x, compressed, bias, activation="gelu", dtype=result)
                expected = np.asarray(jax.nn.gelu(jnp.asarray(with_bias, jnp.float32)))
                yield _row(f"{name}, bias and GELU", x, w, y, expected, GELU_LIMIT)


def check_decode() -> Iterator[dict[str, Any]]:
    """Every variant of the kernel with every kind of values, with bias and ReLU."""
    multiply = jax.jit(decode.matmul, static_argnames=("activation", "vector"))
    for dtype, as_integers in (("bfloat16", False), ("float16", False), ("bfloat16", True)):
        for rows, vector in ROWS_AND_VECTORS:
            x, w = numbers((rows, 2064), dtype, 0), numbers((2064, 1024), dtype, 1)
            packed = _packed(w)
            if as_integers:
                packed = Quantized.of(packed)
                w = packed.astype(jnp.float32).unpack()
            else:
                w = pruned(w, -2)
            bias = numbers((1024,), "float32", 2)
            y = multiply(x, packed, bias, activation="relu", vector=vector)
            expected = np.maximum(_exact(x, w) + np.asarray(bias, np.float64), 0)
            what = "decode, values of int8" if as_integers else "decode"
            yield _row(f"{what}, {vector or 'any'} outputs a thread", x, w, y, expected)


def check_packed_matmul() -> Iterator[dict[str, Any]]:
    """Both through the public function."""
    x, w = numbers((16, 1024), "bfloat16", 0), numbers((1024, 512), "bfloat16", 1)
    packed = _packed(w)
    for implementation in ("decode", "cusparselt", "xla"):
        y = nmjax.packed_matmul(x, packed, implementation=implementation)
        w = pruned(w, -2)
        yield _row(f'packed_matmul, implementation="{implementation}"', x, w, y, _exact(x, w))


def check_sparse_dense(implementation: Any) -> Iterator[dict[str, Any]]:
    """The product and both gradients."""
    x, w = numbers((64, 256), "bfloat16", 0), numbers((256, 128), "bfloat16", 1)
    g = numbers((64, 128), "bfloat16", 2)
    y, pull = jax.vjp(
        jax.jit(lambda x, w: nmjax.kernels.sparse_dense(x, w, implementation=implementation)), x, w
    )
    dx, dw = pull(g)
    sparse = jnp.where(transposable_mask(w), w, jnp.zeros_like(w))
    name = f"sparse_dense, implementation={implementation!r}"
    yield _row(name, x, w, y, _exact(x, sparse))
    yield _row(f"{name}, gradient of x", g, w, dx, _exact(g, sparse.T))
    yield _row(f"{name}, gradient of w", x, w, dw, _exact(x.T, g))


def _packed(w: jax.Array) -> Any:
    plan = nmjax.make_plan({"w": w}, "2:4")
    return jax.jit(lambda w: nmjax.pack({"w": w}, plan)["w"])(w)


def _exact(x: jax.Array, w: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64) @ np.asarray(w).astype(np.float64)


def _row(
    what: str,
    x: jax.Array,
    w: jax.Array,
    y: jax.Array,
    expected: np.ndarray,
    limit: float | None = None,
) -> dict[str, Any]:
    if y.dtype == jnp.int8:
        expected = np.clip(np.round(expected), -128, 127)
    difference = np.asarray(y).astype(np.float64) - expected
    error = float(np.linalg.norm(difference) / np.linalg.norm(expected))
    if limit is None:
        limit = FLOAT8_LIMIT if x.dtype == jnp.float8_e4m3fn else LIMITS[str(y.dtype)]
    return {
        "what": what,
        "dtype": f"{x.dtype} -> {y.dtype}",
        "shape": f"{x.shape} {w.shape}",
        "error": error,
        "limit": limit,
        "right": bool(error <= limit),  # NaN is not.
    }
