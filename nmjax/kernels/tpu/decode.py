"""Rows times a packed N:M weight on TPUs: a Pallas kernel that rebuilds the weight tile by tile.

The dense weight never exists in HBM. A tile's kept values and codes come in packed; for each place
of the group, integer logic on whole registers makes the plane of weights at that place, which the
matrix unit multiplies by the inputs at that place. Nothing is compared, and no rows move.

Dropped weights are zeros that meet the input, as in a dense product on TPUs, so an input that is
not finite makes NaN. Sums are in float32. With int8 values the input is split into three int8 parts
relative to the largest magnitude of its row, so that the product takes int8 throughout and is
summed exactly: the input is rounded at 2 ** -23 of that magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.kernels.calls import batched, result_like
from nmjax.kernels.operands import Activation
from nmjax.kernels.reference import dense_product, finish
from nmjax.kernels.tpu.placement import on_whole_operands
from nmjax.packed.tiled import TiledNM, Tiling, tiling
from nmjax.packed.weight import Packed
from nmjax.patterns.nm import NM

# Rows and outputs that one step of the kernel takes. More outputs spread its fixed cost.
_ROWS, _OUTPUTS = 256, 512
# A TPU core's memory has 64 MiB or more; the compiler grants 16 unless asked.
_MEMORY = 48 * 2**20
# x is split into parts of this many bits, of which it takes three for a float32's precision.
_PART, _PARTS = 8, 3

Interpret = Any  # False, or `pltpu.InterpretParams()` to run on a CPU.


def matmul(
    x: jax.Array,
    packed: Packed,
    bias: jax.Array | None = None,
    activation: Activation = None,
    *,
    scales: jax.Array | None = None,
    interpret: Interpret = False,
    may_unpack: bool = False,
) -> jax.Array:
    """Multiplies x (batch, inputs) by a packed N:M matrix: (batch, outputs).

    Args:
      x: bfloat16; or float32, which is split into three bfloat16 parts.
      packed: a matrix; a `PackedNM` is laid out for TPUs in each call.
      bias: (outputs,).
      activation: None or `"relu"`.
      scales: float32 (outputs,), if the values are int8: those of
        `nmjax.kernels.quantized.QuantizedNM`.
      may_unpack: whether to unpack the weight where the kernel cannot run: on several devices
        outside `jax.shard_map`, and on other platforms. False raises NotImplementedError there.
      interpret: `pltpu.InterpretParams()` runs the kernel on a CPU, for tests.

    Raises:
      NotImplementedError: the kernel does not take the dtype, pattern or shape.
    """
    check(x.dtype, packed, x.shape[0])
    tiled = packed if isinstance(packed, TiledNM) else TiledNM.of(packed)
    # Beyond one batch of rows, `jax.vmap` adds more rows to the same weight.
    return batched(partial(_call, activation, interpret, may_unpack), x, (tiled, scales), bias)


def check(dtype: np.dtype, packed: Packed, rows: int = 1) -> None:
    """Raises NotImplementedError unless the kernel multiplies x of this dtype by the weight."""
    del rows
    way = tiling(packed.pattern, packed.dtype)
    if isinstance(packed, TiledNM) and way.lane != packed.lane:
        raise NotImplementedError(
            f"its values were {packed.lane} bits wide when nmjax.for_platform laid them out, and "
            f"are {packed.dtype} now; cast before for_platform"
        )
    if packed.kernel_taps or packed.values.ndim != 3:
        raise NotImplementedError("it takes one matrix; map over a stack of layers")
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"it takes x of bfloat16 or float32, not {dtype}")


def _call(
    activation: Activation,
    interpret: Interpret,
    may_unpack: bool,
    x: jax.Array,
    weight: tuple[TiledNM, jax.Array | None],
    bias: jax.Array | None,
) -> jax.Array:
    tiled, scales = weight
    way, dtype = tiled.tiling, tiled.result_dtype(x)

    def finished(y: jax.Array, rest: Sequence[jax.Array]) -> jax.Array:
        if scales is not None:
            y = y * rest[0][None]
        return finish(y, None if bias is None else rest[-1], activation, dtype)

    def kernel(x: jax.Array, values: jax.Array, codes: jax.Array, *rest: jax.Array) -> jax.Array:
        return finished(_sums(x, values, codes, tiled.pattern, way, interpret), rest)

    def otherwise(x: jax.Array, values: jax.Array, codes: jax.Array, *rest: jax.Array) -> jax.Array:
        whole = TiledNM(values, codes, tiled.leaf_plan, way.lane).portable()
        if scales is not None:
            whole = whole.with_values(whole.values.astype(x.dtype))
        return finished(dense_product(x, whole), rest)

    rest = [array for array in (scales, bias) if array is not None]
    operands = (x, tiled.values, tiled.codes, *rest)
    if interpret:
        return kernel(*operands)
    return on_whole_operands(kernel, otherwise if may_unpack else None, *operands)


def _sums(
    x: jax.Array,
    values: jax.Array,
    codes: jax.Array,
    pattern: NM,
    way: Tiling,
    interpret: Interpret,
) -> jax.Array:
    """Sums over all weights, float32 (batch, outputs)."""
    if values.dtype == np.int8:
        parts, scale = _int8_parts(x)
        y = _planes_product(parts, values, codes, pattern, way, interpret)
        shifts = np.float32(2) ** (_PART * np.arange(_PARTS, dtype=np.float32))
        total = sum(y[i] * shifts[i] for i in reversed(range(_PARTS)))
        return total * scale
    parts = x[None] if x.dtype == jnp.bfloat16 else _bfloat16_parts(x)
    y = _planes_product(parts, values, codes, pattern, way, interpret)
    # Small parts first, so that their sum is not rounded away.
    return sum(y[i] for i in reversed(range(len(parts))))  # type: ignore[return-value]


def _bfloat16_parts(x: jax.Array) -> jax.Array:
    """Three bfloat16 arrays whose sum is x, largest first."""
    parts = []
    for _ in range(3):
        parts.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    return jnp.stack(parts).astype(jnp.bfloat16)


def _int8_parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Integers of 8 bits, least significant first, and the step of each row (rows, 1).

    x is the sum of `parts[i] * 256 ** i * step`, to 2 ** -23 of the largest magnitude of its row.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    # The largest becomes 2 ** 22 steps, so that the third part fits 8 bits after carries.
    step = jnp.where(largest > 0, largest, 1) * np.float32(2.0 ** -(_PART * _PARTS - 2))
    rest = jnp.round(x / step).astype(jnp.int32)
    parts = []
    for _ in range(_PARTS):
        low = ((rest + 128) & 255) - 128
        parts.append(low.astype(jnp.int8))
        rest = (rest - low) >> _PART
    return jnp.stack(parts), step


def _planes_product(
    parts: jax.Array,
    values: jax.Array,
    codes: jax.Array,
    pattern: NM,
    way: Tiling,
    interpret: Interpret,
) -> jax.Array:
    """Multiplies (parts, batch, inputs) by the weight: (parts, batch, outputs), float32."""
    # Imported where it is used, because JAX may come without Pallas.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    count, batch, _ = parts.shape
    groups, outputs = values.shape[1:]
    rows = count * batch
    x = _by_place(parts.reshape(rows, -1), pattern, groups)
    block = way.block(groups)
    block_rows, block_outputs = min(rows, _ROWS), min(outputs, _OUTPUTS)
    grid = (pl.cdiv(rows, block_rows), pl.cdiv(outputs, block_outputs), groups // block)
    code_rows = block // (way.groups_per_word * way.shifts)
    y: jax.Array = pl.pallas_call(
        partial(_kernel, pattern, way),
        grid=grid,
        in_specs=[
            pl.BlockSpec((pattern.m, block_rows, block), lambda r, o, g: (0, r, g)),
            pl.BlockSpec((pattern.n, block, block_outputs), lambda r, o, g: (0, g, o)),
            pl.BlockSpec((code_rows, block_outputs), lambda r, o, g: (g, o)),
        ],
        out_specs=pl.BlockSpec((block_rows, block_outputs), lambda r, o, g: (r, o)),
        out_shape=result_like((rows, outputs), np.dtype(np.float32), x, values, codes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_MEMORY
        ),
        interpret=interpret,
        name=f"nmjax_decode_{pattern.n}_{pattern.m}",
    )(x, values, codes)
    return y.reshape(count, batch, outputs)


def _by_place(x: jax.Array, pattern: NM, groups: int) -> jax.Array:
    """The inputs at each place of the groups: (m, rows, groups), zeros behind the last group."""
    # With a stride of 1 the members of a group are neighbors.
    members = x.reshape(x.shape[0], -1, pattern.m, pattern.stride)
    places = jnp.transpose(members, (2, 0, 1, 3)).reshape(pattern.m, x.shape[0], -1)
    return jnp.pad(places, ((0, 0), (0, 0), (0, groups - places.shape[2])))


def _kernel(pattern: NM, way: Tiling, x: Any, values: Any, codes: Any, y: Any) -> None:
    """Adds the product of one block of groups to a block of the result."""
    from jax.experimental import pallas as pl

    sum_dtype = np.int32 if values.dtype == np.int8 else np.float32
    total = jnp.zeros(y.shape, sum_dtype)
    for place, weights in enumerate(_planes(pattern, way, values, codes)):
        total += jnp.dot(x[place], weights(), preferred_element_type=sum_dtype)
    first = pl.program_id(2) == 0

    @pl.when(first)
    def _() -> None:
        y[...] = total.astype(np.float32)

    @pl.when(~first)
    def _() -> None:
        y[...] += total.astype(np.float32)


def _planes(pattern: NM, way: Tiling, values: Any, codes: Any) -> Sequence[Callable[[], jax.Array]]:
    """For each place of the groups, a function that makes its weights (groups, outputs).

    Each plane is made when it is multiplied, because all of them at once do not fit into registers.
    """
    from jax.experimental.pallas import tpu as pltpu

    narrow = values.dtype if way.lane == 8 else jnp.bfloat16
    words = [pltpu.bitcast(values[i].astype(narrow), jnp.int32) for i in range(pattern.n)]
    fields = _fields(codes[...], way)
    masks = partial(_mask, fields, way)
    if (pattern.n, pattern.m) == (2, 4):
        planes = _planes_of_2_4(words[0], words[1], masks)
    else:
        planes = _planes_of_positions(pattern, words, masks)
    return [partial(_as_values, narrow, plane) for plane in planes]


def _as_values(dtype: Any, plane: Callable[[], jax.Array]) -> jax.Array:
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.bitcast(plane(), dtype)


def _fields(codes: jax.Array, way: Tiling) -> jax.Array:
    """Words of the shape of the values', with each group's code in the low bits of its lane."""
    rows, outputs = codes.shape
    tiles = codes.reshape(rows // 8, 8, outputs)
    shifted = [tiles >> np.int32(i * way.field) for i in range(way.shifts)]
    return jnp.stack(shifted, axis=1).reshape(rows * way.shifts, outputs)


def _mask(fields: jax.Array, way: Tiling, bit: int) -> jax.Array:
    """All ones in the lane of each group whose code has a bit set."""
    ones = np.int32(sum(1 << lane for lane in range(0, 32, way.lane)))
    low = (fields >> np.int32(bit)) & ones
    return (low << np.int32(way.lane)) - low


def _planes_of_2_4(
    first: jax.Array, second: jax.Array, mask: Callable[[int], jax.Array]
) -> Sequence[Callable[[], jax.Array]]:
    """From the four bits that say what is kept.

    A place holds the first kept value if none is before it, and the second if none is behind it.
    """
    differ = first ^ second
    kept = [mask(bit) for bit in range(4)]
    return [
        lambda: first & kept[0],
        lambda: kept[1] & (first ^ (kept[0] & differ)),
        lambda: kept[2] & (second ^ (kept[3] & differ)),
        lambda: second & kept[3],
    ]


def _planes_of_positions(
    pattern: NM, words: Sequence[jax.Array], mask: Callable[[int], jax.Array]
) -> Sequence[Callable[[], jax.Array]]:
    """From n positions: each bit of a position halves the places where its value can be."""
    width = (pattern.m - 1).bit_length()
    trees = []
    for i, word in enumerate(words):
        level = [word]
        for bit in reversed(range(width)):
            kept = mask(i * width + bit)
            high = [a & kept for a in level]
            level = [half for a, h in zip(level, high, strict=True) for half in (a ^ h, h)]
        trees.append(level)

    def plane(place: int) -> jax.Array:
        total = trees[0][place]
        for tree in trees[1:]:
            total = total | tree[place]
        return total

    return [partial(plane, place) for place in range(pattern.m)]
