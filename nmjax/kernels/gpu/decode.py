"""Few rows times a packed 2:4 weight on NVIDIA GPUs; the kernel (`decode.cuh`) reads it packed."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.kernels.calls import batched, result_like
from nmjax.kernels.gpu.decode_library import check_decode
from nmjax.kernels.operands import Activation
from nmjax.kernels.split import split
from nmjax.packed.nm import PackedNM
from nmjax.packed.quantized import Quantized
from nmjax.packed.weight import Packed
from nmjax.patterns.nm import NM

# The kernel takes weights with sizes that are multiples of this.
_STEP = 16


def matmul(
    x: jax.Array,
    packed: PackedNM | Quantized,
    bias: jax.Array | None = None,
    activation: Activation = None,
    *,
    vector: Literal[0, 2, 4, 8] = 0,
) -> jax.Array:
    """Multiplies x (batch, inputs) by a packed 2:4 matrix: (batch, outputs), of x's dtype.

    Args:
      x: of the weight's dtype, bfloat16 or float16; bfloat16 if it is quantized. Every 64 rows of
        a batch read the weight once.
      packed: a 2:4 matrix, both sizes multiples of 16. Sums are in float32.
      bias: (outputs,), added in float32.
      activation: None or `"relu"`.
      vector: how many outputs a thread reads at a time, for benchmarks; 0 picks.

    Raises:
      NotImplementedError: the kernel is missing, or does not take the dtype, pattern or shape.
      ValueError: an unknown activation.
    """
    check(x.dtype, packed, x.shape[0])
    if activation not in (None, "relu"):
        raise ValueError(f'activation must be None or "relu", got {activation!r}')
    # Beyond one batch of rows, `jax.vmap` adds more rows to the same weight.
    weight = (packed.packed, packed.scales) if isinstance(packed, Quantized) else (packed, None)
    return batched(partial(_call, vector, activation), x, weight, bias)


def check(dtype: np.dtype, packed: Packed, rows: int = 1) -> None:
    """Raises NotImplementedError unless the kernel multiplies x of this dtype by the weight."""
    del rows
    check_decode()
    if packed.pattern != NM(2, 4):
        raise NotImplementedError(f"it multiplies 2:4 weights, not {packed.pattern}")
    if packed.kernel_taps or packed.values.ndim != 3:
        raise NotImplementedError(
            "it takes one matrix; map over a stack of layers, and convolutions stay packed"
        )
    if isinstance(packed, Quantized):
        if dtype != jnp.bfloat16:
            raise NotImplementedError(f"it multiplies bfloat16 by int8 values, not {dtype}")
    elif dtype not in (jnp.bfloat16, jnp.float16) or packed.dtype != dtype:
        raise NotImplementedError(
            f"it takes bfloat16 or float16 throughout, not {dtype} and {packed.dtype}"
        )
    groups, _, outputs = packed.values.shape
    if 4 * groups % _STEP or outputs % _STEP:
        raise NotImplementedError(f"it takes sizes that are multiples of {_STEP}")


def _call(
    vector: int,
    activation: Activation,
    x: jax.Array,
    weight: tuple[PackedNM, jax.Array | None],
    bias: jax.Array | None,
) -> jax.Array:
    # XLA's FFI has no optional operands: an empty array stands for a missing one.
    none = jnp.zeros(0, jnp.float32)
    packed, scales = weight

    def kernel(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        shape = (x.shape[0], arrays[0].shape[-1])
        call = jax.ffi.ffi_call("nmjax_decode", result_like(shape, x.dtype, x, arrays[0]))
        y: jax.Array = call(x, *arrays, relu=activation == "relu", vector=np.int64(vector))
        return y

    return split(
        kernel,
        x,
        packed.values,
        packed.codes,
        none if scales is None else scales,
        none if bias is None else bias.astype(jnp.float32),
        rule=f"b i, g n o, c o, {'y' if scales is None else 'o'}, {'z' if bias is None else 'o'} "
        "-> b o",
        steps={"o": _STEP},
    )
