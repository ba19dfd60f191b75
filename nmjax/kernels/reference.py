"""The definition of every kernel: each output sums the products of its kept weights.

Kept weights are those that the packed arrays hold, zeros among them. They meet the input as IEEE
arithmetic says: an infinite input times a kept zero is NaN. Dropped weights do not meet the input:
whatever it is there, it changes nothing. Zeros of a convolution's padding are inputs like others.
Denormal numbers may count as zeros, as they do for XLA on CPUs.

All implementations follow this rule on CPUs, except plain XLA in a process with several devices.
There the input may be sharded, and asking whether all of it is finite would communicate. So plain
XLA follows the rule only where it sees that the input lies on one device: outside transformations
such as `jax.jit`, and inside `jax.shard_map` over all axes of the mesh. Elsewhere, and on other
platforms, it multiplies the zeros of dropped weights too, so an input that is not finite makes NaN.

Sums are kept in float32 or wider. Bias and activation are applied before the result is rounded to
its dtype, as in a fused kernel. The backward pass is that of the product with the unpacked weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    return finish(sums(x, packed), bias, activation, packed.result_dtype(x))


def conv(
    x: jax.Array,
    packed: Packed,
    window: Window,
    bias: jax.Array | None = None,
    activation: Activation = None,
) -> jax.Array:
    """Convolves x (batch, *spatial, inputs) with a packed kernel: (batch, *spatial, outputs)."""
    return finish(sums(x, packed, window), bias, activation, packed.result_dtype(x))


def dense_product(x: jax.Array, packed: Packed, window: Window | None = None) -> jax.Array:
    """Sums over all weights, the zeros of dropped ones too: the same wherever x is finite."""
    dtype = packed.result_dtype(x)
    return _product(x.astype(dtype), packed.dense_matrices().astype(dtype), window)


def sums(x: jax.Array, packed: Packed, window: Window | None = None) -> jax.Array:
    """Sums over kept weights, float32 or wider.

    Args:
      x: (batch, inputs), or (batch, *spatial, inputs) with a window.
      packed: one matrix, or a kernel.
      window: of a convolution.
    """
    rounded = packed.rounded_inputs(x)
    if rounded is not None:
        integers, steps = rounded
        if window is None and packed.has_one_scale:
            w = packed.stored(np.dtype(np.float32)).dense_matrices().astype(np.int8)
            total = _product(integers, w, None)  # Of int32: exact.
            return packed.scaled(total.astype(jnp.float32) * steps)
        x = (integers.astype(jnp.float32) * steps).astype(x.dtype)
    # Integers have their scales applied to the sums, which are exact as long as x is integers too.
    stored = packed.stored(x.dtype)
    return packed.scaled(_sums(x, stored, window, _is_on_one_device(x)))


def _is_on_one_device(x: jax.Array) -> bool:
    """Whether x surely is on one device, or the part of one device."""
    if jax.device_count() == 1:
        return True
    if isinstance(x, jax.core.Tracer):
        # Tracers do not say where the compiler puts them, except inside `jax.shard_map`.
        mesh = jax.sharding.get_abstract_mesh()
        return bool(mesh.manual_axes) and set(mesh.manual_axes) == set(mesh.axis_names)
    return not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1


# Compiled as one, so that eager calls do not compile the branches again and again.
@partial(jax.jit, static_argnames=("window", "on_one_device"), inline=True)
def _sums(x: jax.Array, packed: Packed, window: Window | None, on_one_device: bool) -> jax.Array:
    dense, kept = (partial(f, window=window) for f in (dense_product, _kept_product))
    if not on_one_device:
        return dense(x, packed)

    def by_finiteness(x: jax.Array, packed: Packed) -> jax.Array:
        y: jax.Array = lax.cond(_all_finite(x), dense, kept, x, packed)
        return y

    # GPUs would have to wait for the host, which looks at the condition.
    y: jax.Array = lax.platform_dependent(x, packed, cpu=by_finiteness, default=dense)
    return y


@jax.custom_batching.custom_vmap
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


# One answer for all mapped inputs: with one for each, both branches of the condition would run.
@_all_finite.def_vmap
def _all_finite_mapped(size: int, mapped: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
    del size, mapped
    return _all_finite(x), False


def _product(x: jax.Array, w: jax.Array, window: Window | None) -> jax.Array:
    """Multiplies x by a dense weight of the same dtype."""
    if window is None:
        # Without it, XLA would round bfloat16 sums before the bias is added.
        return jnp.matmul(x, w, preferred_element_type=sum_dtype(x.dtype))
    if window.has_wide_gaps(x.shape[1:-1], w.shape[:-2]):
        return _tap_by_tap(lambda x, w: (_product(x, w, None),), x, (w,), window)[0]
    # The last letters: one spatial axis is W, two are HW.
    spatial = "DHW"[3 - (x.ndim - 2) :]
    return lax.conv_general_dilated(
        x,
        w,
        window_strides=window.strides,
        padding=window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        preferred_element_type=sum_dtype(x.dtype),
    )


def _kept_product(x: jax.Array, packed: Packed, window: Window | None = None) -> jax.Array:
    """Sums over kept weights only, for any x. It costs about a dozen dense products."""
    parts = partial(_parts, dtype=packed.result_dtype(x))
    w = packed.dense_matrices()
    kept = packed.with_values(jnp.ones_like(packed.values)).dense_matrices() != 0
    if window is None:
        finite, rising, falling, undefined = parts(x, w, kept)
    else:
        finite, rising, falling, undefined = _tap_by_tap(parts, x, (w, kept), window)
    y = jnp.where(rising > 0, jnp.inf, jnp.where(falling > 0, -jnp.inf, finite))
    return jnp.where((undefined > 0) | ((rising > 0) & (falling > 0)), jnp.nan, y)


def _parts(x: jax.Array, w: jax.Array, kept: jax.Array, dtype: np.dtype) -> tuple[jax.Array, ...]:
    """The sum of finite products of kept weights, and how many others are inf, -inf and NaN."""

    def finite(a: jax.Array) -> jax.Array:
        return jnp.where(jnp.isfinite(a), a, 0).astype(dtype)

    def count(*pairs: tuple[jax.Array, jax.Array]) -> jax.Array:
        inputs = jnp.concatenate([a for a, _ in pairs], axis=-1).astype(jnp.float32)
        weights = jnp.concatenate([b for _, b in pairs], axis=-2).astype(jnp.float32)
        return _product(inputs, weights, None)

    (up, down, zero), (w_up, w_down, w_zero) = _signs(x), _signs(w)
    inf, w_inf = jnp.isinf(x), jnp.isinf(w)
    same = ((inf & up, w_up), (inf & down, w_down), (up, w_inf & w_up), (down, w_inf & w_down))
    opposite = ((inf & up, w_down), (inf & down, w_up), (up, w_inf & w_down), (down, w_inf & w_up))
    undefined = (
        (jnp.isnan(x), kept),
        (jnp.ones_like(up), jnp.isnan(w)),
        (inf, kept & w_zero),
        (zero, w_inf),
    )
    return _product(finite(x), finite(w), None), count(*same), count(*opposite), count(*undefined)


def _signs(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether numbers are above, below, or at zero, where denormals are."""
    # Some threads of XLA flush denormals and some do not, so a > 0 may be true in one place only.
    tiny = jnp.finfo(a.dtype).smallest_normal
    return a >= tiny, a <= -tiny, jnp.abs(a) < tiny


def _tap_by_tap(
    product: Callable[..., tuple[jax.Array, ...]],
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    window: Window,
) -> tuple[jax.Array, ...]:
    """Adds up what `product(pixels, *weights of a tap)` returns for each tap.

    It needs no memory for the gaps of a dilated window: XLA's convolution pads the image by them.
    """
    taps = weights[0].shape[:-2]
    steps = [
        # Beyond any image, and still integers of 32 bits.
        np.clip(np.arange(tap) * dilation - before, -(2**30), 2**30).astype(np.int32)
        for tap, dilation, (before, _) in zip(taps, window.dilation, window.padding, strict=True)
    ]
    offsets = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, len(taps))
    output = window.output(x.shape[1:-1], taps)

    def one(tap: tuple[jax.Array, tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
        offset, held = tap
        pixels = x
        for axis, (size, stride) in enumerate(zip(output, window.strides, strict=True)):
            places = jnp.arange(size, dtype=jnp.int32) * stride + offset[axis]
            # Negative places would count from the end; both sides are zeros of the padding.
            places = jnp.where(places < 0, x.shape[axis + 1], places)
            pixels = jnp.take(pixels, places, axis=axis + 1, mode="fill", fill_value=0)
        return product(pixels, *held)

    flat = tuple(w.reshape(-1, *w.shape[-2:]) for w in weights)
    first, rest = (
        jax.tree.map(lambda a, part=part: a[part], (offsets, flat)) for part in (0, slice(1, None))
    )
    total, _ = lax.scan(
        lambda total, tap: (jax.tree.map(jnp.add, total, one(tap)), None), one(first), rest
    )
    return total


def finish(
    y: jax.Array, bias: jax.Array | None, activation: FusedActivation, dtype: np.dtype
) -> jax.Array:
    """Adds the bias to finished sums, applies the activation, and rounds."""
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
    if activation == "relu":
        y = jax.nn.relu(y)
    if activation == "gelu":
        # The tanh form, which is the one that cuSPARSELt computes.
        y = jax.nn.gelu(y, approximate=True)
    return y.astype(dtype)


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that products of a dtype are summed in."""
    if dtype == np.int8:
        return np.dtype(np.int32)
    # Not JAX's promotion, which users may set to strict.
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)
