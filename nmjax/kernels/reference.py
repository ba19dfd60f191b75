"""The definition of every kernel: unpack the weight, and multiply as XLA does.

Sums are kept in float32 at least; bias and activation are applied before the result is rounded to
its dtype, as a fused kernel does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.kernels.operands import (
    Activation,
    FusedActivation,
    Packed,
    Window,
    as_matrices,
    reduction_shape,
    result_dtype,
)
from nmjax.packed.blocks import unpack_blocks
from nmjax.packed.nm import PackedNM, unpack_nm


def matmul(
    x: jax.Array, packed: Packed, bias: jax.Array | None = None, activation: Activation = None
) -> jax.Array:
    """X (batch, inputs) times the weight, (batch, outputs)."""
    dtype = result_dtype(x, packed)
    w = dense_weight(packed)
    y = jnp.matmul(x, w, preferred_element_type=sum_dtype(dtype))
    return finish(y, bias, activation, dtype)


def conv(
    x: jax.Array,
    packed: Packed,
    window: Window,
    bias: jax.Array | None = None,
    activation: Activation = None,
) -> jax.Array:
    """X (batch, *spatial, inputs) convolved with the weight, (batch, *spatial, outputs)."""
    dtype = result_dtype(x, packed)
    w = dense_weight(packed)
    spatial = "DHW"[3 - (x.ndim - 2) :]
    y = lax.conv_general_dilated(
        x.astype(dtype),
        w.astype(dtype),
        window_strides=window.strides,
        padding=window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        preferred_element_type=sum_dtype(dtype),
    )
    return finish(y, bias, activation, dtype)


def dense_weight(packed: Packed) -> jax.Array:
    """The weight with its zeros, (*taps, inputs, outputs)."""
    matrices = as_matrices(packed)
    if not isinstance(matrices, PackedNM):
        return unpack_blocks(matrices)
    w = unpack_nm(matrices)
    if packed.leaf_plan.pattern.taps == "with inputs":
        # Groups run over (input, *taps) of each filter.
        return jnp.moveaxis(w.reshape(*reduction_shape(packed), w.shape[-1]), 0, -2)
    return w


def finish(
    y: jax.Array, bias: jax.Array | None, activation: FusedActivation, dtype: np.dtype
) -> jax.Array:
    """Bias, activation and rounding of finished sums."""
    if bias is not None:
        y = y + bias.astype(y.dtype)
    if activation == "relu":
        y = jax.nn.relu(y)
    if activation == "gelu":
        y = jax.nn.gelu(y, approximate=True)
    return y.astype(dtype)


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """In what products of this dtype are summed."""
    return jnp.promote_types(dtype, jnp.float32)
