"""Products with packed weights, by the fastest way for the platform and the shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.kernels import reference
from nmjax.kernels.cpu import ffi, plain
from nmjax.kernels.cpu.choice import choose, why_unsupported
from nmjax.kernels.cpu.library import load_library
from nmjax.kernels.gpu import cusparselt, decode
from nmjax.kernels.gpu.devices import why_no_gpu
from nmjax.kernels.operands import (
    Activation,
    Packed,
    Padding,
    Window,
    as_window,
    kernel_taps,
    one_layer,
    output_shape,
    reduction_shape,
    stack_of,
    taps_of,
)
from nmjax.packed.nm import PackedNM
from nmjax.packed.packing import is_packed, unpack_leaf

Implementation = Literal["xla", "ffi", "cusparselt", "decode"] | None
Way = Literal["ffi", "ffi only", "cusparselt only", "decode only", "gather", "row by row", "dense"]


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
    packed, in reverse mode. Under `jax.vmap` over `x` the new axis joins the batch. Inside
    `jax.shard_map` the arrays of `packed` may be a shard of its outputs; the result is then that
    shard's. Outside, under `jax.jit`, a batch or outputs sharded over automatic axes of a mesh
    stay so, without communication: a sharded batch of `x`, and the last axis of an N:M weight's
    arrays or the first of a 1xN weight's. Operands sharded over explicit axes take the unpacked
    product.

    Args:
      x: (..., *reduction axes of the weight), floating.
      packed: one leaf of what `nmjax.pack` returns; of a stack of layers take one, or use
        `jax.vmap` or `jax.lax.scan`.
      bias: of the shape of the weight's output axes.
      activation: None or `"relu"`, applied after the bias.
      implementation: `"xla"`; `"ffi"`, the compiled kernels for CPUs; or, for 2:4 on NVIDIA's
        GPUs, `"decode"` for few rows and `"cusparselt"` for many, which compresses the weight anew
        in each call (`nmjax.kernels.gpu.cusparselt.prepare` does it once). None takes what measured
        faster for the platform and the shape, so neither of the last two, which nobody has
        measured yet. See `nmjax.backends`.

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
    if taps_of(packed) or stack_of(packed):
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
    rows = x.reshape(math.prod(batch), math.prod(inputs))
    way = _way(rows, packed, rows.shape[0], implementation)
    y = _multiply(way, activation, rows, packed, _flat_bias(bias, packed))
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
    if stack_of(packed):
        raise ValueError(
            f"a weight of shape {packed.shape} is not one kernel: use jax.vmap or jax.lax.scan for "
            "a stack of layers"
        )
    inputs = reduction_shape(packed)[0]
    if x.ndim <= len(taps) or x.shape[-1] != inputs:
        raise ValueError(
            f"x has shape {x.shape}; expected (..., {len(taps)} spatial axes, {inputs} channels) "
            f"for the kernel {packed.shape}"
        )
    batch, spatial = x.shape[: -1 - len(taps)], x.shape[-1 - len(taps) : -1]
    window = as_window(spatial, taps, strides, padding, dilation)
    images = x.reshape(math.prod(batch), *spatial, inputs)
    pixels = images.shape[0] * math.prod(window.output(spatial, taps))
    way = _way(images, packed, pixels, implementation)
    y = _convolve(way, window, activation, images, packed, _flat_bias(bias, packed))
    return y.reshape(*batch, *y.shape[1:])


def unpack_slow(packed: Any, *, rows: int = 1) -> Any:
    """Unpacks, once and for all, the weights that every product would have to unpack.

    Those are the ones for which nothing faster than the dense product is known on this platform.
    Do it before serving: `packed_matmul` unpacks them in each call.

    Args:
      packed: a tree with packed leaves.
      rows: how many a product multiplies at a time: the batch, times the pixels of an output.

    Returns:
      The same tree; the leaves concerned are dense, with zeros.

    >>> import nmjax
    >>> params = {"kernel": jnp.ones((8, 6))}
    >>> packed = nmjax.pack(params, nmjax.make_plan(params, "7:8"))
    >>> unpack_slow(packed)["kernel"].shape
    (8, 6)
    """

    def is_slow(leaf: Any) -> bool:
        if not is_packed(leaf):
            return False
        on_cpu = jax.default_backend() == "cpu"
        layer = jax.eval_shape(one_layer, leaf)
        return not on_cpu or choose(leaf.dtype, layer, rows).name == "dense"

    return jax.tree.map(
        lambda leaf: unpack_leaf(leaf) if is_slow(leaf) else leaf, packed, is_leaf=is_packed
    )


def _way(x: jax.Array, packed: Packed, batch: int, implementation: Implementation) -> Way:
    cut = any(any(jax.typeof(operand).sharding.spec) for operand in jax.tree.leaves((x, packed)))
    if implementation == "xla" or (cut and implementation is None):
        return "dense"
    if implementation is None:
        return choose(x.dtype, packed, batch).name
    obstacle: str | None
    if cut:
        obstacle = "it or x is sharded over explicit axes of a mesh; use jax.shard_map"
    elif implementation == "ffi":
        obstacle = load_library().reason or why_unsupported(x.dtype, packed)
    else:
        obstacle = _why_not_on_gpus(x, packed, implementation)
    if obstacle:
        raise ValueError(
            f'implementation="{implementation}" cannot multiply {packed.shape}: {obstacle}'
        )
    return _ONLY[implementation]


_ONLY: dict[str, Way] = {
    "ffi": "ffi only",
    "cusparselt": "cusparselt only",
    "decode": "decode only",
}


def _why_not_on_gpus(x: jax.Array, packed: Packed, implementation: str) -> str | None:
    if not isinstance(packed, PackedNM):
        return f"it multiplies 2:4 weights, not {packed.leaf_plan.pattern}"
    if x.ndim != 2:
        return "it multiplies matrices, not convolutions"
    if implementation == "decode":
        obstacle = decode.why_not(x.dtype, packed)
    else:
        obstacle = cusparselt.why_not_product(x.dtype, x.shape[0], packed)
    return obstacle or why_no_gpu()


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply(
    way: Way, activation: Activation, x: jax.Array, packed: Packed, bias: jax.Array | None
) -> jax.Array:
    return _on_platform(way, _MATMULS, x, packed, bias, activation=activation)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _convolve(
    way: Way,
    window: Window,
    activation: Activation,
    x: jax.Array,
    packed: Packed,
    bias: jax.Array | None,
) -> jax.Array:
    return _on_platform(way, _CONVS, x, packed, bias, activation=activation, window=window)


_MATMULS = {
    "dense": reference.matmul,
    "gather": plain.gather_matmul,
    "row by row": plain.row_by_row_matmul,
    "ffi": ffi.matmul,
    "cusparselt": cusparselt.packed_matmul,
    "decode": decode.matmul,
}
_CONVS = {"dense": reference.conv, "ffi": ffi.conv}


def _on_platform(
    way: Way, ways: dict[str, Any], x: jax.Array, packed: Packed, bias: Any, **settings: Any
) -> jax.Array:
    """What was chosen for CPUs runs there only; the weight is unpacked elsewhere."""
    if way == "dense" or way.endswith(" only"):
        return ways[way.removesuffix(" only")](x, packed, bias=bias, **settings)
    return lax.platform_dependent(
        x,
        packed,
        bias,
        cpu=lambda x, packed, bias: ways[way](x, packed, bias=bias, **settings),
        default=lambda x, packed, bias: ways["dense"](x, packed, bias=bias, **settings),
    )


def _multiply_forward(way: Way, activation: Activation, *operands: Any) -> tuple[Any, Any]:
    y = _multiply(way, activation, *operands)
    return y, (operands, y)


def _multiply_backward(way: Way, activation: Activation, saved: Any, g: jax.Array) -> Any:
    del way
    return _backward(reference.matmul, activation, saved, g)


def _convolve_forward(
    way: Way, window: Window, activation: Activation, *operands: Any
) -> tuple[Any, Any]:
    y = _convolve(way, window, activation, *operands)
    return y, (operands, y)


def _convolve_backward(
    way: Way, window: Window, activation: Activation, saved: Any, g: jax.Array
) -> Any:
    del way
    return _backward(partial(reference.conv, window=window), activation, saved, g)


def _backward(linear: Any, activation: Activation, saved: Any, g: jax.Array) -> Any:
    """Through the definition, which is linear: XLA drops its forward product."""
    (x, packed, bias), y = saved
    if activation == "relu":
        g = jnp.where(y > 0, g, jnp.zeros_like(g))
    _, pull = jax.vjp(lambda x, packed, bias: linear(x, packed, bias=bias), x, packed, bias)
    return pull(g)


_multiply.defvjp(_multiply_forward, _multiply_backward)
_convolve.defvjp(_convolve_forward, _convolve_backward)


def _check(packed: Any, activation: Any, implementation: Any) -> None:
    if not is_packed(packed):
        raise TypeError(
            f"expected a packed weight, a leaf of what nmjax.pack returns, got {type(packed)}"
        )
    if not isinstance(packed, PackedNM) and packed.row_pointers is not None:
        rows = packed.row_pointers.shape[-1] - 1
        planned = packed.leaf_plan.outputs // packed.leaf_plan.pattern.n
        if rows != planned:
            raise ValueError(
                f"this is a shard of {packed.shape}: {rows} row pointers for {planned} rows of "
                "blocks. Only uniform rows can be cut by outputs; take a plan without /layer"
            )
    if activation not in (None, "relu"):
        raise ValueError(f'activation must be None or "relu", got {activation!r}')
    if implementation not in (None, "xla", *_ONLY):
        raise ValueError(
            f'implementation must be None, "xla", "ffi", "cusparselt" or "decode", got '
            f"{implementation!r}"
        )


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
