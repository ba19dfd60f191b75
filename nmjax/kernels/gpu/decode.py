"""Few rows times a packed 2:4 weight on NVIDIA's GPUs, which read it packed: `decode.cuh`."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.kernels.cpu.ffi import batched, result_like
from nmjax.kernels.gpu.decode_library import why_no_decode
from nmjax.kernels.operands import Activation, kernel_taps
from nmjax.kernels.quantized import QuantizedNM
from nmjax.kernels.split import split
from nmjax.packed.nm import PackedNM
from nmjax.patterns import NM

# The kernel takes weights whose sizes are multiples of it.
_STEP = 16


def matmul(
    x: jax.Array,
    packed: PackedNM | QuantizedNM,
    bias: jax.Array | None = None,
    activation: Activation = None,
    *,
    vector: Literal[0, 2, 4, 8] = 0,
) -> jax.Array:
    """X (batch, inputs) times the weight, (batch, outputs), of x's dtype; sums are in float32.

    Args:
      x: of the weight's dtype, bfloat16 or float16; bfloat16 where the values are int8. Any batch;
        beyond 64 rows, each 64 read the weight again.
      packed: a 2:4 matrix, both sizes multiples of 16; see `nmjax.kernels.quantized` for int8.
      bias: (outputs,), added in float32.
      activation: None or `"relu"`.
      vector: how many outputs a thread reads at a time, for measuring; 0 picks.

    Raises:
      ValueError: the kernel is not there, or does not take the dtype, the pattern or the shape;
        an unknown activation.
    """
    obstacle = why_not(x.dtype, packed)
    if activation not in (None, "relu"):
        obstacle = obstacle or f'activation must be None or "relu", got {activation!r}'
    if obstacle:
        raise ValueError(f"the kernel for few rows cannot multiply {packed.shape}: {obstacle}")
    return batched(partial(_call, vector, activation), x, packed, bias)


def why_not(dtype: np.dtype, packed: PackedNM | QuantizedNM) -> str | None:
    """Why the kernel does not multiply x of this dtype by a packed leaf here, or None."""
    obstacle = why_no_decode()
    if obstacle:
        return obstacle
    leaf = packed.packed if isinstance(packed, QuantizedNM) else packed
    if not isinstance(leaf, PackedNM) or leaf.leaf_plan.pattern != NM(2, 4):
        return f"it multiplies 2:4 weights, not {leaf.leaf_plan.pattern}"
    if kernel_taps(leaf) or leaf.values.ndim != 3:
        return "it takes one matrix; map over a stack of layers, and convolutions stay packed"
    if isinstance(packed, QuantizedNM):
        if dtype != jnp.bfloat16:
            return f"it multiplies bfloat16 by values of int8, not {dtype}"
    elif dtype not in (jnp.bfloat16, jnp.float16) or leaf.dtype != dtype:
        return f"it takes bfloat16 or float16 throughout, not {dtype} and {leaf.dtype}"
    groups, _, outputs = leaf.values.shape
    if 4 * groups % _STEP or outputs % _STEP:
        return f"it takes sizes that are multiples of {_STEP}"
    return None


def _call(
    vector: int,
    activation: Activation,
    x: jax.Array,
    packed: PackedNM | QuantizedNM,
    bias: jax.Array | None,
) -> jax.Array:
    none = jnp.zeros(0, jnp.float32)
    leaf, scales = (
        (packed.packed, packed.scales) if isinstance(packed, QuantizedNM) else (packed, none)
    )

    def kernel(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        shape = (x.shape[0], arrays[0].shape[-1])
        call = jax.ffi.ffi_call("nmjax_decode", result_like(shape, x.dtype, x, arrays[0]))
        y: jax.Array = call(x, *arrays, relu=activation == "relu", vector=np.int64(vector))
        return y

    return split(
        kernel,
        x,
        leaf.values,
        leaf.codes,
        scales,
        none if bias is None else bias.astype(jnp.float32),
        rule=f"b i, g n o, c o, {'o' if scales.size else 'y'}, {'z' if bias is None else 'o'} "
        "-> b o",
        steps={"o": _STEP},
    )
