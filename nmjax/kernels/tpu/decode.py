"""Rows times a packed N:M weight on TPUs: a Pallas kernel that rebuilds the weight tile by tile.

The dense weight never exists in HBM. A tile's kept values and codes come in packed; for each place
of the group, integer logic on whole registers makes the plane of weights at that place, which the
matrix unit multiplies by the inputs at that place. Nothing is compared, and no rows move:
the inputs come in the order in which a register's weights are rebuilt.

Dropped weights are zeros that meet the input, as in a dense product on TPUs, so an input that is
not finite makes NaN. Sums are in float32. With int8 values the input is split into three int8 parts
relative to the largest magnitude of its row, so that the product takes int8 throughout and is
summed exactly: the input is rounded at 2 ** -22 of that magnitude.
"""

from __future__ import annotations

import math
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
from nmjax.kernels.tpu.placement import explicit_axes, on_shards, on_whole_operands
from nmjax.packed.tiled import TiledNM, Tiling, tiling
from nmjax.packed.weight import Packed
from nmjax.patterns.nm import NM

# Rows and outputs that one step of the kernel takes. More outputs spread its fixed cost.
_ROWS, _OUTPUTS = 256, 512
# Outputs that it multiplies at a time, so that what it rebuilds stays in registers.
_CHUNK_OUTPUTS = 256
# With so few rows and n up to 2, the kernel's loop over groups is unrolled. Otherwise an iteration
# has enough to do, and the unrolled loop would compile several times as long.
_FEW_ROWS = 64
# Lanes of a register, and how many of them a small product may reorder.
_LANES, _MIXED = 128, 256
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
        `nmjax.Quantized`.
      may_unpack: whether to unpack the weight where the kernel cannot run: on several devices
        outside `jax.shard_map`, and on other platforms. False raises NotImplementedError there.
      interpret: `pltpu.InterpretParams()` runs the kernel on a CPU, for tests.

    Raises:
      NotImplementedError: the kernel does not take the dtype, pattern or shape.
    """
    check(x.dtype, packed, x.shape[0])
    tiled = packed if isinstance(packed, TiledNM) else TiledNM.of(packed)
    call = partial(_call, activation, interpret, may_unpack)
    if axes := explicit_axes(x, tiled):

        def shard(x: jax.Array, tiled: TiledNM, *vectors: jax.Array | None) -> jax.Array:
            return call(x, (tiled, vectors[0]), vectors[1])

        return on_shards(shard, axes, x, tiled, scales, bias)
    # Beyond one batch of rows, `jax.vmap` adds more rows to the same weight.
    return batched(call, x, (tiled, scales), bias)


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

    x is the sum of `parts[i] * 256 ** i * step`, to 2 ** -22 of the largest magnitude of its row.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    # A power of two, so that integers stay exact; without the mantissa it is the next one below.
    bits = lax.bitcast_convert_type(largest, jnp.int32) & np.int32(0x7F800000)
    power = jnp.maximum(lax.bitcast_convert_type(bits, jnp.float32), np.float32(2.0**-100))
    # The largest is below 2 ** 22 steps, so that the third part fits 8 bits after carries.
    step = power * np.float32(2.0 ** -(_PART * _PARTS - 3))
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
    x = _in_tiles(parts.reshape(rows, -1), pattern, way, groups)
    block = way.block(groups)
    block_rows, block_outputs = min(rows, _ROWS), min(outputs, _OUTPUTS)
    grid = (pl.cdiv(rows, block_rows), pl.cdiv(outputs, block_outputs), groups // block)
    unroll = not interpret and block_rows <= _FEW_ROWS and pattern.n <= 2
    call = pl.pallas_call(
        partial(_kernel, pattern, way, unroll),
        grid=grid,
        in_specs=[
            pl.BlockSpec((block_rows, block * pattern.m), lambda r, o, g: (r, g)),
            pl.BlockSpec((pattern.n, block, block_outputs), lambda r, o, g: (0, g, o)),
            pl.BlockSpec((way.code_rows(block), block_outputs), lambda r, o, g: (g, o)),
        ],
        out_specs=pl.BlockSpec((block_rows, block_outputs), lambda r, o, g: (r, o)),
        out_shape=result_like((rows, outputs), np.dtype(np.float32), x, values, codes),
        cost_estimate=_cost(x, values, codes, grid[0], grid[1]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_MEMORY
        ),
        interpret=interpret,
        name=f"nmjax_decode_{pattern.n}_{pattern.m}",
    )
    # TPUs count in 32 bits, while Python's integers would have 64 under jax_enable_x64.
    with jax.enable_x64(False):
        y: jax.Array = call(x, values, codes)
    return y.reshape(count, batch, outputs)


def _cost(x: jax.Array, values: jax.Array, codes: jax.Array, row_blocks: int, blocks: int) -> Any:
    """What XLA's scheduler should know: it sees nothing of a kernel's inside."""
    from jax.experimental import pallas as pl

    outputs = values.shape[-1]
    # The weight is read once for each block of rows, and x once for each block of outputs.
    moved = (values.nbytes + codes.nbytes) * row_blocks + x.nbytes * blocks
    return pl.CostEstimate(
        flops=2 * x.size * outputs,  # The matrix unit multiplies the zeros, too.
        bytes_accessed=moved + 4 * x.shape[0] * outputs,
        transcendentals=0,
    )


def _in_tiles(x: jax.Array, pattern: NM, way: Tiling, groups: int) -> jax.Array:
    """The inputs in the order of the weights that the kernel rebuilds: (rows, groups * m).

    A register of values holds `tile` groups. Its weights are rebuilt place by place, so the inputs
    of these groups come place by place too, with zeros behind the last group.
    """
    tile, m = way.tile, pattern.m
    rows, inputs = x.shape
    if tile % pattern.stride:
        # The members of a group lie in several tiles.
        members = x.reshape(rows, -1, m, pattern.stride)
        x = jnp.swapaxes(members, 2, 3).reshape(rows, inputs)
        stride = 1
    else:
        stride = pattern.stride
    x = jnp.pad(x, ((0, 0), (0, groups * m - inputs)))
    if stride == tile:
        return x
    if (lanes := math.lcm(tile * m, _LANES)) > _MIXED or groups * m % lanes:
        members = x.reshape(rows, -1, tile // stride, m, stride)
        return jnp.swapaxes(members, 2, 3).reshape(rows, groups * m)
    # Lanes are mixed by the matrix unit, exactly: XLA's transpose takes several passes.
    order = np.arange(lanes).reshape(-1, tile // stride, m, stride).swapaxes(1, 2).ravel()
    mix = np.zeros((lanes, lanes), np.int8)
    mix[order, np.arange(lanes)] = 1
    sum_dtype = np.int32 if x.dtype == np.int8 else np.float32
    parts = x.reshape(rows, -1, lanes)
    mixed = jnp.einsum(
        "rkl,lj->rkj", parts, jnp.asarray(mix, x.dtype), preferred_element_type=sum_dtype
    )
    return mixed.astype(x.dtype).reshape(rows, groups * m)


def _kernel(
    pattern: NM, way: Tiling, unroll: bool, x: Any, values: Any, codes: Any, y: Any
) -> None:
    """Adds the product of one block of groups to a block of the result.

    It takes so few groups and outputs at a time that they stay in registers.
    """
    from jax.experimental import pallas as pl

    # Counted in registers of codes.
    block, outputs = codes.shape[0] // 8, codes.shape[1]
    chunk = min(way.chunk(pattern) // way.groups, block)
    first = pl.program_id(2) == 0
    for start in range(0, outputs, _CHUNK_OUTPUTS):
        columns = slice(start, min(start + _CHUNK_OUTPUTS, outputs))
        add = partial(_add_chunk, pattern, way, x, values, codes, columns)
        width = columns.stop - columns.start
        total = jnp.zeros((y.shape[0], width), _sum_dtype(values.dtype))
        total = lax.fori_loop(
            0, block // chunk, lambda i, t, add=add: add(i * chunk, chunk, t), total, unroll=unroll
        )
        if rest := block % chunk:
            total = add(block - rest, rest, total)
        total = total.astype(np.float32)
        y[:, columns] = jnp.where(first, total, y[:, columns] + total)


def _add_chunk(
    pattern: NM,
    way: Tiling,
    x: Any,
    values: Any,
    codes: Any,
    columns: slice,
    start: Any,
    count: int,
    total: jax.Array,
) -> jax.Array:
    """Adds the product of some groups to the sums of some outputs.

    The groups are those of `count` registers of codes, from `start`.
    """
    from jax.experimental import pallas as pl

    def part(size: int) -> Any:
        index = start * size
        return pl.ds(index if isinstance(index, int) else pl.multiple_of(index, size), count * size)

    weights = _weights(pattern, way, values[:, part(way.groups), columns], codes[part(8), columns])
    inputs = x[:, part(way.groups * pattern.m)]
    return total + jnp.dot(inputs, weights, preferred_element_type=total.dtype)


def _sum_dtype(dtype: Any) -> Any:
    return np.int32 if dtype == np.int8 else np.float32


def _weights(pattern: NM, way: Tiling, values: jax.Array, codes: jax.Array) -> jax.Array:
    """Weights in the order of `_in_tiles`: (groups * m, outputs)."""
    from jax.experimental.pallas import tpu as pltpu

    narrow = values.dtype if way.lane == 8 else jnp.bfloat16
    words = [pltpu.bitcast(values[i].astype(narrow), jnp.int32) for i in range(pattern.n)]
    planes = []
    for i in range(words[0].shape[0] // 8):
        tile, shift = divmod(i, way.shifts)
        field = codes[8 * tile : 8 * tile + 8] >> np.int32(shift * way.field)
        mask = partial(_mask, field, way)
        kept = [word[8 * i : 8 * i + 8] for word in words]
        if (pattern.n, pattern.m) == (2, 4):
            planes += _planes_of_2_4(kept[0], kept[1], mask)
        else:
            planes += _planes_of_positions(pattern, kept, mask)
    return pltpu.bitcast(jnp.concatenate(planes), narrow)


def _mask(fields: jax.Array, way: Tiling, bit: int) -> jax.Array:
    """All ones in the lane of each group whose code has a bit set."""
    ones = np.int32(sum(1 << lane for lane in range(0, 32, way.lane)))
    low = (fields >> np.int32(bit)) & ones
    return (low << np.int32(way.lane)) - low


def _planes_of_2_4(
    first: jax.Array, second: jax.Array, mask: Callable[[int], jax.Array]
) -> list[jax.Array]:
    """From the four bits that say what is kept.

    A place holds the first kept value if none is before it, and the second if none is behind it.
    """
    differ = first ^ second
    kept = [mask(bit) for bit in range(4)]
    return [
        first & kept[0],
        kept[1] & (first ^ (kept[0] & differ)),
        kept[2] & (second ^ (kept[3] & differ)),
        second & kept[3],
    ]


def _planes_of_positions(
    pattern: NM, words: Sequence[jax.Array], mask: Callable[[int], jax.Array]
) -> list[jax.Array]:
    """From n positions: each bit of a position halves the places where its value can be."""
    width = (pattern.m - 1).bit_length()
    planes: list[jax.Array] = []
    for i, word in enumerate(words):
        level = [word]
        for bit in reversed(range(width)):
            kept = mask(i * width + bit)
            high = [a & kept for a in level]
            level = [half for a, h in zip(level, high, strict=True) for half in (a ^ h, h)]
        level = level[: pattern.m]
        planes = level if i == 0 else [a | b for a, b in zip(planes, level, strict=True)]
    return planes
