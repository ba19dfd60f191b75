"""Is what GPUs compute right? Every kernel against float64, on random numbers.

The error is the Euclidean norm of the difference over that of the true product. Operands are the
rounded ones on both sides, so it tells of sums and of the rounding of results alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nmjax
from experiments.benchmarks.gpu_products import numbers, pruned
from nmjax.kernels import cusparselt, decode
from nmjax.transposable import transposable_mask

# Rounding to bfloat16 alone gives an error of about 0.0017, to float16 0.0002. Tensor cores keep
# fewer bits of float8 sums than float32 has.
LIMITS = {"bfloat16": 4e-3, "float16": 5e-4, "int8": 0.0, "float8_e4m3fn": 1e-2}
SHAPES = ((8, 64, 32), (16, 1024, 256), (512, 2048, 4096))


def check_cusparselt(dtype: str, transposed: bool) -> Iterator[dict[str, Any]]:
    """Compress and multiply, with and without bias and ReLU."""
    is_byte = jnp.dtype(dtype).itemsize == 1
    name = f"cusparselt{', transposed' if transposed else ''}"
    for rows, inputs, outputs in SHAPES:
        x = numbers((max(rows, 16) if is_byte else rows, inputs), dtype, 0)
        w = pruned(numbers((inputs, outputs), dtype, 1), -2)
        compressed = cusparselt.compress(w.T if transposed else w, transposed=transposed)
        y = jax.jit(cusparselt.matmul)(x, compressed)
        yield _row(name, x, w, y, _exact(x, w))
        if is_byte:
            continue
        bias = numbers((outputs,), dtype, 2)
        biased = jax.jit(cusparselt.matmul, static_argnums=3)(x, compressed, bias, "relu")
        expected = np.maximum(_exact(x, w) + np.asarray(bias, np.float64), 0)
        yield _row(f"{name}, bias and ReLU", x, w, biased, expected)


def check_decode() -> Iterator[dict[str, Any]]:
    """Every number of rows that another variant of the kernel takes, and every variant."""
    for dtype in ("bfloat16", "float16"):
        for rows, vector in ((1, 0), (5, 2), (8, 8), (13, 4), (16, 8), (37, 4), (64, 2)):
            x, w = numbers((rows, 2064), dtype, 0), numbers((2064, 1024), dtype, 1)
            packed = _packed(w)
            bias = numbers((1024,), "float32", 2)
            multiply = jax.jit(decode.matmul, static_argnames=("activation", "vector"))
            y = multiply(x, packed, bias, activation="relu", vector=vector)
            w = pruned(w, -2)
            expected = np.maximum(_exact(x, w) + np.asarray(bias, np.float64), 0)
            yield _row(f"decode, {vector or 'any'} outputs a thread", x, w, y, expected)


def check_packed_matmul() -> Iterator[dict[str, Any]]:
    """The public way to both."""
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
        jax.jit(lambda x, w: nmjax.sparse_dense(x, w, implementation=implementation)), x, w
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


def _row(what: str, x: jax.Array, w: jax.Array, y: jax.Array, expected: np.ndarray) -> Any:
    difference = np.asarray(y).astype(np.float64) - expected
    error = float(np.linalg.norm(difference) / np.linalg.norm(expected))
    limit = LIMITS[str(x.dtype)]
    return {
        "what": what,
        "dtype": f"{x.dtype} -> {y.dtype}",
        "shape": f"{x.shape} {w.shape}",
        "error": error,
        "limit": limit,
        "right": bool(error <= limit),  # NaN is not.
    }
