"""The definition of every kernel: unpack the weight and multiply with XLA.

Sums are kept in float32 or wider. Bias and activation are applied before the result is rounded to
its dtype, as in a fused kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.kernels.operands import Activation, FusedActivation, Window
from nmjax.packed.weight import Packed


def matmul(
    x: jax.Array, packed: Packed, bias: jax.Array | None = None, activation: Activation = None
) -> jax.Array:
    """Multiplies x (batch, inputs) by a packed weight: (batch, outputs)."""
    dtype = packed.result_dtype(x)
    w = packed.dense_matrices().astype(dtype)
    # Without it, XLA would round bfloat16 sums before the bias is added.
    y = jnp.matmul(x.astype(dtype), w, preferred_element_type=sum_dtype(dtype))
    return finish(y, bias, activation, dtype)


def conv(
    x: jax.Array,
    packed: Packed,
    window: Window,
    bias: jax.Array | None = None,
    activation: Activation = None,
) -> jax.Array:
    """Convolves x (batch, *spatial, inputs) with a packed kernel: (batch, *spatial, outputs)."""
    dtype = packed.result_dtype(x)
    w = packed.dense_matrices()
    # The last letters: one spatial axis is W, two are HW.
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


def finish(
    y: jax.Array, bias: jax.Array | None, activation: FusedActivation, dtype: np.dtype
) -> jax.Array:
    """Adds the bias to finished sums, applies the activation, and rounds."""
    if bias is not None:
        y = y + bias.astype(y.dtype)
    if activation == "relu":
        y = jax.nn.relu(y)
    if activation == "gelu":
        # The tanh form, which is the one that cuSPARSELt computes.
        y = jax.nn.gelu(y, approximate=True)
    return y.astype(dtype)


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that products of a dtype are summed in."""
    return jnp.promote_types(dtype, jnp.float32)
