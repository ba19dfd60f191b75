"""Few rows times a packed 2:4 weight on NVIDIA's GPUs, which read it packed: `decode.cuh`."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.kernels.decode_library import why_no_decode
from nmjax.kernels.ffi import batched, result_like
from nmjax.kernels.operands import Activation, kernel_taps
from nmjax.packed_nm import PackedNM
from nmjax.patterns import NM


def matmul(
    x: jax.Array,
    packed: PackedNM,
    bias: jax.Array | None = None,
    activation: Activation = None,
    *,
    vector: Literal[0, 2, 4, 8] = 0,
) -> jax.Array:
    """X (batch, inputs) times the weight, (batch, outputs), of their dtype; sums are in float32.

    Args:
      x: of the weight's dtype. Any batch; from 32 rows on, each 32 read the weight again.
      packed: a 2:4 matrix, both sizes multiples of 16.
      bias: (outputs,), added in float32.
      activation: None or `"relu"`.
      vector: how many outputs a thread reads at a time, for measuring; 0 picks.

    Raises:
      ValueError: the kernel is not there, or does not take the dtype, the pattern or the shape.
    """
    obstacle = why_not(x.dtype, packed)
    if obstacle:
        raise ValueError(f"the kernel for few rows cannot multiply {packed.shape}: {obstacle}")
    return batched(partial(_call, vector, activation), x, packed, bias)


def why_not(dtype: np.dtype, packed: PackedNM) -> str | None:
    """Why the kernel does not multiply x of this dtype by a packed leaf here, or None."""
    obstacle = why_no_decode()
    if obstacle:
        return obstacle
    if not isinstance(packed, PackedNM) or packed.leaf_plan.pattern != NM(2, 4):
        return f"it multiplies 2:4 weights, not {packed.leaf_plan.pattern}"
    if kernel_taps(packed) or packed.values.ndim != 3:
        return "it takes one matrix; map over a stack of layers, and convolutions stay packed"
    if dtype not in (jnp.bfloat16, jnp.float16) or packed.dtype != dtype:
        return f"it takes bfloat16 or float16 throughout, not {dtype} and {packed.dtype}"
    groups, _, outputs = packed.values.shape
    if groups % 4 or outputs % 16:
        return "it takes sizes that are multiples of 16"
    return None


def _call(
    vector: int, activation: Activation, x: jax.Array, packed: PackedNM, bias: jax.Array | None
) -> jax.Array:
    shape = (x.shape[0], packed.values.shape[-1])
    result = result_like(shape, x.dtype, x, packed.values)
    return jax.ffi.ffi_call("nmjax_decode", result)(
        x,
        packed.values,
        packed.codes,
        jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32),
        relu=activation == "relu",
        vector=np.int64(vector),
    )
