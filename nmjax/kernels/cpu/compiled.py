"""Products by the compiled kernels (`src/`), through XLA's FFI."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.kernels.calls import batched, result_like
from nmjax.kernels.cpu.library import load_library
from nmjax.kernels.operands import Activation, Window
from nmjax.kernels.split import split
from nmjax.packed.blocks import PackedBlocks
from nmjax.packed.nm import PackedNM
from nmjax.packed.quantized import Quantized
from nmjax.packed.weight import Packed

_ONE_TAP = Window((1, 1), ((0, 0), (0, 0)), (1, 1))

# Outputs that the kernel for groups computes at a time.
_LANES = 16
_DTYPES = (jnp.float32, jnp.bfloat16)
# Of int8: a larger sum may not fit into 32 bits.
_MOST_INPUTS = 2**17


def matmul(
    x: jax.Array, packed: Packed, bias: jax.Array | None = None, activation: Activation = None
) -> jax.Array:
    """Multiplies x (batch, inputs) by a packed weight: (batch, outputs)."""
    if isinstance(packed, Quantized) and packed.rounds_inputs:
        return batched(partial(_integers, activation=activation), x, packed, bias)
    return _kind(packed).matmul(x, packed, bias, activation)


def conv(
    x: jax.Array,
    packed: PackedBlocks | Quantized,
    window: Window,
    bias: jax.Array | None = None,
    activation: Activation = None,
) -> jax.Array:
    """Convolves x (batch, *spatial, inputs), up to two spatial axes, with a kernel of blocks."""
    taps, spatial = packed.taps, x.shape[1:-1]
    if len(taps) == 1:
        taps, spatial = (1, *taps), (1, *spatial)
        window = Window((1, *window.strides), ((0, 0), *window.padding), (1, *window.dilation))
    images = x.reshape(x.shape[0], *spatial, x.shape[-1])
    product = partial(_blocks, window=window, taps=taps, activation=activation)
    y = batched(product, images, packed, bias)
    return y.reshape(y.shape[0], *y.shape[1 + len(taps) - (x.ndim - 2) : -1], y.shape[-1])


def check(dtype: np.dtype, packed: Packed, rows: int = 1) -> None:
    """Raises NotImplementedError unless the compiled kernels can multiply these operands here."""
    del rows
    library = load_library()
    if library.instruction_set is None:
        raise NotImplementedError(f"no compiled kernels: {library.reason}")
    if dtype not in _DTYPES or packed.dtype not in _DTYPES:
        raise NotImplementedError(
            f"kernels multiply float32 and bfloat16, not {dtype} by {packed.dtype}"
        )
    if isinstance(packed, Quantized):
        _check_quantized(packed)
        packed = packed.packed
    if type(packed) not in _KINDS:
        raise NotImplementedError(f"there are no kernels for {packed.pattern}")
    _KINDS[type(packed)].check(packed)


def check_pays(packed: Packed, rows: int) -> str:
    """Says why the kernels are faster than XLA's dense product.

    Raises:
      NotImplementedError: they are not.
    """
    del rows
    library, density = load_library(), packed.density
    if library.instruction_set == "portable":
        # Without AVX2 the kernels are correct, and slower than XLA's dense product.
        raise NotImplementedError("no AVX2 here")
    if packed.rounds_inputs:
        return f"{library.instruction_set}, int8 by int8"
    limit = _kind(packed).density_limit
    if density > limit:
        raise NotImplementedError(
            f"{density:.1%} kept: above {limit:.0%} the dense product is faster"
        )
    integers = ", int8 weights" if isinstance(packed, Quantized) else ""
    return f"{library.instruction_set}, {density:.1%} kept{integers}"


def _check_quantized(packed: Quantized) -> None:
    if not isinstance(packed.packed, PackedBlocks):
        raise NotImplementedError(f"kernels multiply int8 values of 1xN blocks, not {packed}")
    if not packed.has_one_scale:
        raise NotImplementedError("kernels take one scale for each output")
    if packed.rounds_inputs and packed.kernel_taps:
        raise NotImplementedError("kernels round the inputs of matrices, not of convolutions")
    if packed.rounds_inputs and packed.inputs > _MOST_INPUTS:
        raise NotImplementedError(f"sums of {packed.inputs} products may not fit into 32 bits")


def _check_groups(packed: PackedNM) -> None:
    pattern = packed.pattern
    if packed.kernel_taps:
        raise NotImplementedError("kernels multiply N:M matrices, not convolutions")
    if pattern.m > 32 or pattern.n == pattern.m:
        raise NotImplementedError(f"kernels take groups of 2 to 32, not {pattern}")
    if packed.outputs % _LANES:
        raise NotImplementedError(
            f"kernels take a multiple of {_LANES} outputs, not {packed.outputs}"
        )


def _check_blocks(packed: PackedBlocks) -> None:
    pattern = packed.pattern
    if pattern.n % 4:
        raise NotImplementedError(
            f"kernels take blocks of a multiple of 4 outputs, not {pattern.n}"
        )
    if len(packed.taps) > 2:
        raise NotImplementedError("kernels take up to two spatial axes")


def _matmul_groups(
    x: jax.Array, packed: PackedNM, bias: jax.Array | None, activation: Activation
) -> jax.Array:
    return batched(partial(_groups, activation=activation), packed.by_group(x), packed, bias)


def _matmul_blocks(
    x: jax.Array, packed: PackedBlocks | Quantized, bias: jax.Array | None, activation: Activation
) -> jax.Array:
    # A product is the convolution of one image of a single row of pixels.
    product = partial(_blocks, window=_ONE_TAP, taps=(1, 1), activation=activation)
    return batched(product, x[None, None], packed, bias, axis=2)[0, 0]


def _blocks(
    x: jax.Array,
    weight: PackedBlocks | Quantized,
    bias: jax.Array | None,
    *,
    window: Window,
    taps: tuple[int, ...],
    activation: Activation,
) -> jax.Array:
    """(images, height, width, inputs) -> (images, height, width, outputs)."""
    before = [low for low, _ in window.padding]
    # The order that `src/ffi.cc` reads them in.
    moves = np.array([*taps, *window.strides, *before, *window.dilation], np.int64)
    packed: Any = weight.packed if isinstance(weight, Quantized) else weight
    scales = [weight.scales] if isinstance(weight, Quantized) else []
    name = "nmjax_blocks_int8" if scales else "nmjax_blocks"
    n, dtype, structure = packed.pattern.n, weight.result_dtype(x), jax.tree.structure(packed)

    count = structure.num_leaves  # type: ignore[attr-defined]

    def kernel(x: jax.Array, bias: jax.Array, *rest: jax.Array) -> jax.Array:
        # Of a split product, the arrays are the shard of one device.
        arrays, scales = rest[:count], rest[count:]
        part = jax.tree.unflatten(structure, arrays)
        shape = (x.shape[0], *window.output(x.shape[1:3], taps), part.outputs)
        # XLA's FFI has no optional operands: an empty array stands for a missing one.
        pointers = part.row_pointers
        y = jax.ffi.ffi_call(name, result_like(shape, dtype, x, part.values))(
            x,
            part.values,
            part.indices,
            jnp.zeros(0, jnp.int32) if pointers is None else pointers,
            bias.ravel(),
            *[array.ravel() for array in scales],
            n=np.int64(n),
            relu=activation == "relu",
            window=moves,
        )
        return y.reshape(*shape[:-1], shape[-1] // n, n)

    # A product's rows are the width of one image, and may be split over devices. In a real image a
    # pixel needs its neighbors, so only whole images are.
    images = "h w b" if window == _ONE_TAP and x.shape[:2] == (1, 1) else "b h w"
    is_uniform = packed.row_pointers is None
    axes = "r k v, r k" if is_uniform else "k v, k, p"
    operands = f"{images} i, {'r' if bias is not None else 'z'} n, {axes}{', r n' * len(scales)}"
    rule = f"{operands} -> {images} r n"
    arrays = [*jax.tree.leaves(packed), *[array.reshape(-1, n) for array in scales]]
    y = split(
        kernel,
        x,
        _float32(bias).reshape(-1, n),
        *arrays,
        rule=rule,
        whole="h w n" if is_uniform else "h w n r",
    )
    return y.reshape(*y.shape[:-2], packed.outputs)


def _integers(
    x: jax.Array, packed: Quantized, bias: jax.Array | None, *, activation: Activation
) -> jax.Array:
    """(batch, inputs) -> (batch, outputs), with both rounded to int8."""
    blocks: Any = packed.packed
    n, dtype, structure = blocks.pattern.n, packed.result_dtype(x), jax.tree.structure(blocks)

    def kernel(
        x: jax.Array, steps: jax.Array, bias: jax.Array, scales: jax.Array, *arrays: jax.Array
    ) -> jax.Array:
        part = jax.tree.unflatten(structure, arrays)
        shape = (x.shape[0], part.outputs)
        pointers = part.row_pointers
        y = jax.ffi.ffi_call("nmjax_integers", result_like(shape, dtype, x, part.values))(
            x,
            steps,
            part.values,
            part.indices,
            jnp.zeros(0, jnp.int32) if pointers is None else pointers,
            bias.ravel(),
            scales.ravel(),
            n=np.int64(n),
            relu=activation == "relu",
        )
        return y.reshape(shape[0], -1, n)

    rounded = packed.rounded_inputs(x)
    if rounded is None:
        raise ValueError(f"the inputs of {packed} stay floating")
    integers, steps = rounded
    is_uniform = blocks.row_pointers is None
    axes = "r k v, r k" if is_uniform else "k v, k, p"
    y = split(
        kernel,
        integers,
        steps[:, 0],
        _float32(bias).reshape(-1, n),
        packed.scales.reshape(-1, n),
        *jax.tree.leaves(blocks),
        rule=f"b i, b, {'r' if bias is not None else 'z'} n, r n, {axes} -> b r n",
        whole="n" if is_uniform else "n r",
    )
    return y.reshape(x.shape[0], packed.outputs)


def _groups(
    x: jax.Array, packed: PackedNM, bias: jax.Array | None, *, activation: Activation
) -> jax.Array:
    """(batch, inputs) -> (batch, outputs)."""
    # Read off the arrays, since inside `jax.shard_map` they may be a shard.
    m, dtype = np.int64(x.shape[-1] // packed.values.shape[-3]), packed.result_dtype(x)

    def kernel(x: jax.Array, bias: jax.Array, values: jax.Array, codes: jax.Array) -> jax.Array:
        shape = (x.shape[0], values.shape[-1])
        return jax.ffi.ffi_call("nmjax_groups", result_like(shape, dtype, x, values))(
            x, values, codes, bias, m=m, relu=activation == "relu"
        )

    return split(
        kernel,
        x,
        _float32(bias),
        packed.values,
        packed.codes,
        rule=f"b i, {'o' if bias is not None else 'z'}, g n o, c o -> b o",
        steps={"o": _LANES},
    )


def _float32(bias: jax.Array | None) -> jax.Array:
    return jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32)


def work(packed: Packed) -> str:
    """Names the work that a product does, for tables of measured times."""
    prefix = "int8 " if isinstance(packed, Quantized) else ""
    return prefix + _kind(packed).work(packed)


def _work_of_blocks(packed: Packed) -> str:
    if not packed.taps:
        return "blocks"
    return "pixels" if math.prod(packed.taps) == 1 else "taps"


class _Kind(NamedTuple):
    """The kernels for one kind of packed weight.

    Attributes:
      matmul: (x, packed, bias, activation) -> y.
      check: raises NotImplementedError for a weight that they do not take.
      density_limit: above it XLA's dense product is faster, as measured by
        `experiments.benchmarks.packed`.
      work: what a product does, as `work` names it.
    """

    matmul: Callable[..., jax.Array]
    check: Callable[[Any], None]
    density_limit: float
    work: Callable[[Any], str]


def _kind(packed: Packed) -> _Kind:
    return _KINDS[type(packed.packed if isinstance(packed, Quantized) else packed)]


_KINDS: dict[type[Packed], _Kind] = {
    PackedNM: _Kind(_matmul_groups, _check_groups, 0.5, lambda packed: "groups"),
    PackedBlocks: _Kind(_matmul_blocks, _check_blocks, 0.7, _work_of_blocks),
}
