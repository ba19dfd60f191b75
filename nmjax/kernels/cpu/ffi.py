"""Calls of the compiled kernels, as functions that `jax.vmap` takes apart well."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nmjax.kernels.operands import (
    Activation,
    Packed,
    Window,
    outputs_of,
    result_dtype,
    taps_of,
)
from nmjax.kernels.split import split
from nmjax.packed.blocks import PackedBlocks
from nmjax.packed.nm import PackedNM

_ONE_TAP = Window((1, 1), ((0, 0), (0, 0)), (1, 1))

# Outputs that the kernel for groups computes at a time.
_LANES = 16


def matmul(
    x: jax.Array, packed: Packed, bias: jax.Array | None = None, activation: Activation = None
) -> jax.Array:
    """X (batch, inputs) times the weight, (batch, outputs)."""
    if isinstance(packed, PackedNM):
        return batched(partial(_groups, activation=activation), x, packed, bias)
    product = partial(_blocks, window=_ONE_TAP, taps=(1, 1), activation=activation)
    return batched(product, x[None, None], packed, bias, axis=2)[0, 0]


def conv(
    x: jax.Array,
    packed: PackedBlocks,
    window: Window,
    bias: jax.Array | None = None,
    activation: Activation = None,
) -> jax.Array:
    """X (batch, *spatial, inputs), one or two spatial axes, convolved with a kernel of blocks."""
    taps, spatial = taps_of(packed), x.shape[1:-1]
    if len(taps) == 1:
        taps, spatial = (1, *taps), (1, *spatial)
        window = Window((1, *window.strides), ((0, 0), *window.padding), (1, *window.dilation))
    images = x.reshape(x.shape[0], *spatial, x.shape[-1])
    product = partial(_blocks, window=window, taps=taps, activation=activation)
    y = batched(product, images, packed, bias)
    return y.reshape(y.shape[0], *y.shape[1 + len(taps) - (x.ndim - 2) : -1], y.shape[-1])


def _blocks(
    x: jax.Array,
    packed: PackedBlocks,
    bias: jax.Array | None,
    *,
    window: Window,
    taps: tuple[int, ...],
    activation: Activation,
) -> jax.Array:
    """X (images, height, width, inputs) -> (images, height, width, outputs)."""
    before = [low for low, _ in window.padding]
    moves = np.array([*taps, *window.strides, *before, *window.dilation], np.int64)
    n = packed.leaf_plan.pattern.n

    def kernel(x: jax.Array, bias: jax.Array, *arrays: jax.Array) -> jax.Array:
        part = jax.tree.unflatten(jax.tree.structure(packed), arrays)
        shape = (x.shape[0], *window.output(x.shape[1:3], taps), outputs_of(part))
        pointers = part.row_pointers
        y = jax.ffi.ffi_call(
            "nmjax_blocks", result_like(shape, result_dtype(x, part), x, part.values)
        )(
            x,
            part.values,
            part.indices,
            jnp.zeros(0, jnp.int32) if pointers is None else pointers,
            bias.ravel(),
            n=np.int64(n),
            relu=activation == "relu",
            window=moves,
        )
        return y.reshape(*shape[:-1], shape[-1] // n, n)

    # A product's rows are the width of one image; of other images, a pixel needs its neighbours.
    images = "h w b" if window == _ONE_TAP and x.shape[:2] == (1, 1) else "b h w"
    is_uniform = packed.row_pointers is None
    weight = "r k v, r k" if is_uniform else "k v, k, p"
    rule = f"{images} i, {'r' if bias is not None else 'z'} n, {weight} -> {images} r n"
    arrays = jax.tree.leaves(packed)
    y = split(
        kernel,
        x,
        _float32(bias).reshape(-1, n),
        *arrays,
        rule=rule,
        whole="h w n" if is_uniform else "h w n r",
    )
    return y.reshape(*y.shape[:-2], outputs_of(packed))


def _groups(
    x: jax.Array, packed: PackedNM, bias: jax.Array | None, *, activation: Activation
) -> jax.Array:
    """X (batch, inputs) -> (batch, outputs)."""
    m = np.int64(x.shape[-1] // packed.values.shape[-3])

    def kernel(x: jax.Array, bias: jax.Array, values: jax.Array, codes: jax.Array) -> jax.Array:
        shape = (x.shape[0], values.shape[-1])
        return jax.ffi.ffi_call(
            "nmjax_groups", result_like(shape, result_dtype(x, packed), x, values)
        )(x, values, codes, bias, m=m, relu=activation == "relu")

    return split(
        kernel,
        x,
        _float32(bias),
        packed.values,
        packed.codes,
        rule=f"b i, {'o' if bias is not None else 'z'}, g n o, c o -> b o",
        steps={"o": _LANES},
    )


def batched(
    product: Callable[..., jax.Array],
    x: jax.Array,
    packed: Any,
    bias: jax.Array | None,
    axis: int = 0,
) -> jax.Array:
    """`product(x, packed, bias)`, for which a mapped axis of x joins x's batch at `axis`.

    Where the weight is mapped too, the products are computed one after the other.
    """

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, packed: Any, bias: jax.Array | None) -> jax.Array:
        return product(x, packed, bias)

    @call.def_vmap
    def map_call(size: int, mapped: Any, x: Any, packed: Any, bias: Any) -> tuple[jax.Array, bool]:
        if any(jax.tree.leaves(mapped[1:])):
            arguments = (x, packed, bias)

            def one(i: jax.Array) -> jax.Array:
                chosen = jax.tree.map(lambda a, m: a[i] if m else a, arguments, tuple(mapped))
                return call(*chosen)

            return jax.lax.map(one, jnp.arange(size)), True
        together = jnp.moveaxis(x, 0, axis)
        shape = together.shape
        merged = together.reshape(
            *shape[:axis], math.prod(shape[axis : axis + 2]), *shape[axis + 2 :]
        )
        y = call(merged, packed, bias)
        y = y.reshape(*y.shape[:axis], *shape[axis : axis + 2], *y.shape[axis + 1 :])
        return jnp.moveaxis(y, axis, 0), True

    return call(x, packed, bias)


def result_like(shape: tuple[int, ...], dtype: np.dtype, *operands: Any) -> jax.ShapeDtypeStruct:
    """A result that differs over the axes of a mesh, in `jax.shard_map`, that an operand does."""
    sums = jax.eval_shape(lambda *operands: sum(jnp.sum(x) for x in operands), *operands)
    varies = sums.manual_axis_type
    mesh = jax.sharding.get_abstract_mesh()
    sharding = None if mesh.empty else NamedSharding(mesh, PartitionSpec(*[None] * len(shape)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, manual_axis_type=varies)


def _float32(bias: jax.Array | None) -> jax.Array:
    return jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32)
