"""Products with packed weights, by the fastest way for the platform and the shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nmjax.kernels import reference
from nmjax.kernels.operands import (
    Activation,
    Packed,
    Padding,
    as_window,
    kernel_taps,
    output_shape,
    reduction_shape,
    taps_of,
)
from nmjax.packing import is_packed

Implementation = Literal["xla", "ffi"] | None


def packed_matmul(
    x: jax.Array,
    packed: Packed,
    bias: jax.Array | None = None,
    *,
    activation: Activation = None,
    implementation: Implementation = None,
) -> jax.Array:
    """X times a packed weight, without unpacking it where that is faster.

    Differentiable in `x`, the packed values and `bias`, so that kept weights can be fine-tuned
    packed. Under `jax.vmap` over `x` the new axis joins the batch. Inside `jax.shard_map` the
    arrays of `packed` may be a shard of its outputs; the result is then that shard's.

    Args:
      x: (..., *reduction axes of the weight), floating.
      packed: one leaf of what `nmjax.pack` returns; of a stack of layers take one, or use
        `jax.vmap` or `jax.lax.scan`.
      bias: of the shape of the weight's output axes.
      activation: None or `"relu"`, applied after the bias.
      implementation: `"xla"` or `"ffi"` (the compiled kernels, on CPUs); None takes what
        measured faster for the platform and the shape. See `nmjax.backends`.

    Returns:
      (..., *output axes of the weight), of the dtype that `x` and the values promote to; sums are
      kept in float32 at least.

    Raises:
      TypeError: `packed` is not a packed weight, or `x` is not floating.
      ValueError: shapes do not fit; an unknown activation or implementation; the implementation
        asked for cannot take this weight.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [4.0, 8.0]])}
    >>> packed = nmjax.pack(params, nmjax.make_plan(params, "2:4"))
    >>> packed_matmul(jnp.ones((1, 4)), packed["kernel"]).tolist()
    [[7.0, 15.0]]
    """
    _check(packed, activation, implementation)
    inputs = reduction_shape(packed)
    x = jnp.asarray(x)
    _check_floating(x)
    if taps_of(packed):
        raise ValueError(
            f"a weight of shape {packed.shape} is not one matrix: use nmjax.packed_conv for a "
            "convolution, and jax.vmap or jax.lax.scan for a stack of layers"
        )
    if x.shape[x.ndim - len(inputs) :] != inputs:
        raise ValueError(
            f"x has shape {x.shape}; its last axes should be {inputs}, the reduction axes of the "
            f"weight {packed.shape}"
        )
    batch = x.shape[: x.ndim - len(inputs)]
    y = reference.matmul(
        x.reshape(math.prod(batch), math.prod(inputs)),
        packed,
        _flat_bias(bias, packed),
        activation,
    )
    return y.reshape(*batch, *output_shape(packed))


def packed_conv(
    x: jax.Array,
    packed: Packed,
    bias: jax.Array | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    activation: Activation = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Convolves channels-last images with a packed kernel; as `packed_matmul` otherwise.

    Args:
      x: (..., *spatial, inputs), as many spatial axes as the kernel has taps' axes.
      packed: a packed convolution kernel, of any layout.
      bias: (outputs,).
      strides: output steps, one number for all axes or one for each.
      padding: `"SAME"`, `"VALID"`, or zeros around the image: a number for all sides, or for each
        axis a number or a pair (before, after).
      dilation: distance of the kernel's taps, one number or one for each axis.
      activation: None or `"relu"`, applied after the bias.
      implementation: as for `packed_matmul`.

    Returns:
      (..., *spatial, outputs).

    Raises:
      TypeError, ValueError: as `packed_matmul`.
    """
    _check(packed, activation, implementation)
    x = jnp.asarray(x)
    _check_floating(x)
    taps = kernel_taps(packed)
    if not taps:
        raise ValueError(f"a weight of shape {packed.shape} has no taps: use nmjax.packed_matmul")
    inputs = reduction_shape(packed)[0]
    if x.ndim <= len(taps) or x.shape[-1] != inputs:
        raise ValueError(
            f"x has shape {x.shape}; expected (..., {len(taps)} spatial axes, {inputs} channels) "
            f"for the kernel {packed.shape}"
        )
    batch, spatial = x.shape[: -1 - len(taps)], x.shape[-1 - len(taps) : -1]
    window = as_window(spatial, taps, strides, padding, dilation)
    images = x.reshape(math.prod(batch), *spatial, inputs)
    y = reference.conv(images, packed, window, _flat_bias(bias, packed), activation)
    return y.reshape(*batch, *y.shape[1:])


def _check(packed: Any, activation: Any, implementation: Any) -> None:
    if not is_packed(packed):
        raise TypeError(
            f"expected a packed weight, a leaf of what nmjax.pack returns, got {type(packed)}"
        )
    if activation not in (None, "relu"):
        raise ValueError(f'activation must be None or "relu", got {activation!r}')
    if implementation not in (None, "xla", "ffi"):
        raise ValueError(f'implementation must be None, "xla" or "ffi", got {implementation!r}')


def _check_floating(x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, got {x.dtype}{x.shape}")


def _flat_bias(bias: jax.Array | None, packed: Packed) -> jax.Array | None:
    if bias is None:
        return None
    if jnp.shape(bias) != output_shape(packed):
        raise ValueError(
            f"bias has shape {jnp.shape(bias)}, expected {output_shape(packed)}, the output axes "
            f"of the weight {packed.shape}"
        )
    return jnp.ravel(jnp.asarray(bias))
