"""N:M masks on TPUs: one pass over the weights, written in Pallas.

TPU arrays lie in tiles of (8, 128) words of 32 bits. XLA relays an array out several times to cut
groups of 4 out of such tiles. The kernel instead reads every m-th row of a block with a strided
load, so that a register holds one member of 8 x 128 groups, and the members of a group compare
elementwise. Groups along the last axis are first transposed, 128 x 128 words at a time. Along an
axis before the last two, members lie in tiles of their own already.

A 32-bit word holds two rows of bfloat16. The kernel computes with words only, since not every TPU
has 16-bit arithmetic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int32, Shaped

Choose = Callable[[Sequence[jax.Array]], list[jax.Array]]

SUBLANES, LANES = 8, 128  # of a register of 32-bit words

_BLOCK_ROWS = 2048  # 1 MiB of float32, so that copying a block takes longer than starting to
_TILES = 4  # of 128 x 128 words, transposed at a time
_UNROLLED = 64  # registers of words that a step of the loop takes
_HIGH = np.int32(-(2**16))  # the bits of the odd row in a word of two bfloat16


def misfit(shape: tuple[int, ...], dtype: Any, m: int, axes: tuple[int, ...]) -> str | None:
    """Why the kernel cannot take groups of m along negative `axes`, or None."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}"
    if len(shape) < 2 or len(axes) != 1:
        return f"it takes groups along one axis of at least two, not along {axes} of {len(shape)}"
    if not 2 <= m <= 32:
        return f"it takes groups of 2 to 32, not of {m}"
    if axes == (-1,) and LANES % m:
        return f"it takes groups along the last axis if m divides {LANES}; {m} does not"
    if axes == (-2,) and dtype == jnp.bfloat16 and m % 2:
        return f"it takes bfloat16 if m is even, since a word holds two rows; {m} is odd"
    if not math.prod(shape):
        return "there are no weights"
    return None


def keep_in_groups(
    values: Float[Array, "*shape"],
    choose: Choose,
    m: int,
    axes: tuple[int, ...],
    out: np.dtype,
    *,
    interpret: Any = False,
) -> Bool[Array, "*shape"] | Float[Array, "*shape"]:
    """Keeps what `choose` picks of every m consecutive values.

    Args:
      values: float32 or bfloat16, at least two axes.
      choose: from the m members of many groups, as float32, to booleans for each, True = kept.
      m: group size; divides the size of the axis.
      axes: one axis, negative.
      out: bool returns the mask; the dtype of the values, or bfloat16 for values of float32,
        returns them with zeros for those not kept.
      interpret: as in `pallas_call`; runs the kernel on other platforms.

    Raises:
      NotImplementedError: the kernel cannot take this shape, dtype, or pattern (see `misfit`).
    """
    if (reason := misfit(values.shape, values.dtype, m, axes)) is not None:
        raise NotImplementedError(f"the TPU kernel cannot compute masks of groups of {m}: {reason}")
    if (other := _axis_by_columns(values, m, axes)) is not None:
        # A kernel reads arrays by rows, and XLA would copy these. Their transpose moves nothing.
        return keep_in_groups(values.mT, choose, m, other, out, interpret=interpret).mT
    keep = _along_leading if axes[0] < -2 else _along_tiled
    # Pallas would store booleans as 32-bit integers.
    stored = np.dtype(np.int8) if out == np.bool_ else np.dtype(out)
    return keep(values, choose, m, axes[0], stored, interpret).astype(out).reshape(values.shape)


def _axis_by_columns(values: jax.Array, m: int, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where groups lie in the transpose, if XLA stores such matrices by columns.

    It does where that fills fewer tiles, as those of 512 x 1376. None if the kernel cannot use it.
    """
    rows, columns = values.shape[-2:]
    transposed: dict[tuple[int, ...], tuple[int, ...]] = {(-2,): (-1,), (-1,): (-2,)}
    other = transposed.get(axes)
    if other is None or _padding(rows, columns) <= _padding(columns, rows):
        return None
    return other if misfit(values.mT.shape, values.dtype, m, other) is None else None


def _along_tiled(
    values: Float[Array, "*shape"],
    choose: Choose,
    m: int,
    axis: int,
    out: np.dtype,
    interpret: Any,
) -> Shaped[Array, "rows columns"]:
    """Groups along one of the last two axes, which the tiles cut."""
    # A stack of matrices is one tall matrix: no group crosses from one into the next.
    matrix = values.reshape(-1, values.shape[-1])
    packing = 4 // values.dtype.itemsize
    along_lanes = axis == -1
    unit = LANES * packing if along_lanes else SUBLANES * m
    unit = math.lcm(unit, _tile_rows(values.dtype, out))
    rows, columns = matrix.shape
    height = min(-(-rows // unit), max(1, _BLOCK_ROWS // unit)) * unit
    words = height // packing
    scratch = None
    if along_lanes:
        scratch = math.gcd(words, _TILES * LANES)
    elif out != jnp.float32:
        scratch = words
    return _call(
        functools.partial(_keep_block, choose=choose, m=m, along_lanes=along_lanes),
        matrix,
        grid=(pl.cdiv(rows, height), pl.cdiv(columns, LANES)),
        block=pl.BlockSpec((height, LANES), lambda i, j: (i, j)),
        scratch=scratch,
        m=m,
        out=out,
        interpret=interpret,
    )


def _along_leading(
    values: Float[Array, "*shape"],
    choose: Choose,
    m: int,
    axis: int,
    out: np.dtype,
    interpret: Any,
) -> Shaped[Array, "*result"]:
    """Groups along an axis before the last two: members lie in tiles of their own."""
    shape = values.shape
    if LANES % m == 0 and _padding(*shape[-2:]) > _padding(shape[-1], shape[axis]):
        # XLA lays such weights out with this axis last, so moving it there moves nothing.
        moved = jnp.moveaxis(values, axis, -1)
        kept = _along_tiled(moved, choose, m, -1, out, interpret).reshape(moved.shape)
        return jnp.moveaxis(kept, -1, axis)
    before, between = math.prod(shape[:axis]), math.prod(shape[axis + 1 : -2])
    size, rows, columns = shape[axis], *shape[-2:]
    unit = _tile_rows(values.dtype, out)
    height = min(-(-rows // unit), max(1, _BLOCK_ROWS // m // unit)) * unit
    members = min(size // m, max(1, _BLOCK_ROWS // m // height)) * m
    return _call(
        functools.partial(_keep_tiles, choose=choose, m=m),
        values.reshape(before, size, between, rows, columns),
        grid=(
            before,
            pl.cdiv(size, members),
            between,
            pl.cdiv(rows, height),
            pl.cdiv(columns, LANES),
        ),
        block=pl.BlockSpec((1, members, 1, height, LANES), lambda *place: place),
        scratch=None,
        m=m,
        out=out,
        interpret=interpret,
    )


def _padding(rows: int, columns: int) -> float:
    """The size of a matrix's tiles over that of the matrix."""
    tiles = -(-rows // SUBLANES) * -(-columns // LANES)
    return tiles * SUBLANES * LANES / (rows * columns)


def _call(
    body: Callable[..., None],
    values: Float[Array, "*shape"],
    *,
    grid: tuple[int, ...],
    block: pl.BlockSpec,
    scratch: int | None,
    m: int,
    out: np.dtype,
    interpret: Any,
) -> Shaped[Array, "*shape"]:
    """Runs `body` on every block, with `scratch` rows of words where it wants some."""
    result = jax.ShapeDtypeStruct(values.shape, out)
    word = jnp.float32 if values.dtype == jnp.float32 else jnp.int32
    call = pl.pallas_call(
        body,
        out_shape=result,
        grid=grid,
        in_specs=[block],
        out_specs=block,
        scratch_shapes=[] if scratch is None else [pltpu.VMEM((scratch, LANES), word)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=[pltpu.PARALLEL] * len(grid)),
        cost_estimate=pl.CostEstimate(
            flops=values.size * m,
            transcendentals=0,
            bytes_accessed=values.size * (values.dtype.itemsize + result.dtype.itemsize),
        ),
        interpret=interpret,
        name=f"nm_{'mask' if out == jnp.int8 else 'prune'}_{m}",
    )
    # TPUs count in 32 bits, while Python's integers would have 64 under jax_enable_x64.
    with jax.enable_x64(False):
        kept: jax.Array = call(values)
    return kept


def _keep_block(
    x_ref: Any,
    out_ref: Any,
    scratch: Any = None,
    *,
    choose: Choose,
    m: int,
    along_lanes: bool,
) -> None:
    """A block of 128 columns and whole groups along one of the tiled axes."""
    packed = x_ref.dtype.itemsize == 2
    keep = functools.partial(
        _keep_words, choose=choose, rows_compete=not along_lanes, as_mask=out_ref.dtype == jnp.int8
    )
    source = _words(x_ref)

    def finish(words: jax.Array, rows: Any = slice(None)) -> None:
        out_ref[rows, :] = _result(words, x_ref.dtype, out_ref.dtype)

    if along_lanes:
        _each_transposed(source, scratch, functools.partial(_each_strided, m, keep), finish)
    elif scratch is None:
        _each_strided(m, keep, source, out_ref)
    else:
        _each_strided(m // 2 if packed else m, keep, source, scratch)
        finish(scratch[...])


def _keep_tiles(x_ref: Any, out_ref: Any, *, choose: Choose, m: int) -> None:
    """A block of whole groups along its second axis: (1, members, 1, rows, 128)."""
    source = _words(x_ref)
    at_once = _tile_rows(x_ref.dtype, out_ref.dtype)
    words = at_once * x_ref.dtype.itemsize // 4
    tiles = x_ref.shape[3] // at_once
    steps = x_ref.shape[1] // m * tiles

    def step(i: Any, _: None) -> None:
        # Not `//` and `%`, which round down and so ask for signs: i is not negative.
        first, tile = lax.div(i, tiles) * m, lax.rem(i, tiles)
        here = pl.ds(pl.multiple_of(tile * words, words), words)
        there = pl.ds(pl.multiple_of(tile * at_once, at_once), at_once)
        members = [source[0, first + j, 0, here, :] for j in range(m)]
        kept = _keep_words(
            members, choose=choose, rows_compete=False, as_mask=out_ref.dtype == jnp.int8
        )
        for j, some in enumerate(kept):
            out_ref[0, first + j, 0, there, :] = _result(some, x_ref.dtype, out_ref.dtype)

    registers = m * words // SUBLANES
    lax.fori_loop(0, steps, step, None, unroll=math.gcd(steps, max(1, _UNROLLED // registers)))


def _tile_rows(dtype: Any, out: Any) -> int:
    """Rows of the tiles of both values and result."""
    return SUBLANES * (4 // min(np.dtype(dtype).itemsize, np.dtype(out).itemsize))


def _words(ref: Any) -> Any:
    """float32 as it is, and pairs of bfloat16 as 32-bit integers."""
    return ref if ref.dtype == jnp.float32 else ref.bitcast(jnp.int32)


def _result(words: Shaped[Array, "words lanes"], dtype: Any, out: Any) -> jax.Array:
    """What `_keep_words` made of values of `dtype`, in the dtype of the output."""
    kept = pltpu.bitcast(words, dtype)
    return (kept.astype(jnp.float32) != 0).astype(out) if out == jnp.int8 else kept.astype(out)


def _each_transposed(
    source: Any, tiles: Any, keep_rows: Callable[..., None], finish: Callable[..., None]
) -> None:
    """Applies `keep_rows(from, to)` to the transposed tiles of a block."""
    # Several tiles at a time: some wait for loads while others compute.
    size = tiles.shape[0]
    halves = 1 if tiles.dtype == jnp.float32 else 2

    def step(i: Any, _: None) -> None:
        first = pl.multiple_of(i * size, size)
        for j in range(0, size, LANES):
            tiles[pl.ds(j, LANES), :] = source[pl.ds(first + j, LANES), :].T
        keep_rows(tiles, tiles)
        for j in range(0, size, LANES):
            finish(tiles[pl.ds(j, LANES), :].T, pl.ds((first + j) * halves, LANES * halves))

    lax.fori_loop(0, source.shape[0] // size, step, None)


def _each_strided(
    members: int, keep: Callable[[Sequence[jax.Array]], list[jax.Array]], source: Any, target: Any
) -> None:
    """Applies `keep` to groups of consecutive rows, 8 groups at a time."""
    groups = min(SUBLANES, source.shape[0] // members)
    rows = groups * members
    steps = source.shape[0] // rows

    def step(i: Any, _: None) -> None:
        here = pl.ds(pl.multiple_of(i * rows, rows), rows)
        some, to = source.at[here], target.at[here]
        member = [pl.ds(j, groups, stride=members) for j in range(members)]
        kept = keep([some[place, :] for place in member])
        for place, words in zip(member, kept, strict=True):
            to[place, :] = words

    # A group waits for its loads, so a few run side by side.
    lax.fori_loop(0, steps, step, None, unroll=math.gcd(steps, _UNROLLED // members))


def _keep_words(
    words: Sequence[Shaped[Array, "rows lanes"]],
    *,
    choose: Choose,
    rows_compete: bool,
    as_mask: bool,
) -> list[jax.Array]:
    """The words with zeros for what is not kept, and for a mask ones for what is."""
    whole = words[0].dtype == jnp.float32
    ones = np.float32(1) if whole else np.int32(0x3F803F80)
    values = [jnp.full_like(word, ones) for word in words] if as_mask else words
    if whole:
        return [jnp.where(kept, word, 0) for kept, word in zip(choose(words), values, strict=True)]
    # bfloat16 is the upper half of float32.
    lower = [_as_float(word << 16) for word in words]
    upper = [_as_float(word & _HIGH) for word in words]
    if rows_compete:  # The rows in a word belong to one group.
        kept = choose([half for halves in zip(lower, upper, strict=True) for half in halves])
        flags = list(zip(kept[::2], kept[1::2], strict=True))
    else:
        flags = list(zip(choose(lower), choose(upper), strict=True))
    return [
        word & (jnp.where(low, 0xFFFF, 0) | jnp.where(high, _HIGH, 0))
        for (low, high), word in zip(flags, values, strict=True)
    ]


def _as_float(bits: Int32[Array, "rows lanes"]) -> Float[Array, "rows lanes"]:
    return lax.bitcast_convert_type(bits, jnp.float32)
