"""N:M masks on TPUs: one pass over the weights, written in Pallas.

TPU arrays lie in tiles of (8, 128) words of 32 bits. XLA relays an array out several times to cut
groups of 4 out of such tiles. The kernel instead reads every m-th row of a block with a strided
load, so that a register holds one member of 8 x 128 groups, and the members of a group compare
elementwise. Groups along the last axis are first transposed, 128 x 128 words at a time.

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
    if len(shape) < 2 or axes not in ((-1,), (-2,)):
        return f"it takes groups along one of the last two axes, not along {axes} of {len(shape)}"
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
    *,
    as_mask: bool,
    interpret: Any = False,
) -> Bool[Array, "*shape"] | Float[Array, "*shape"]:
    """Keeps what `choose` picks of every m consecutive values.

    Args:
      values: float32 or bfloat16, at least two axes.
      choose: from the m members of many groups, as float32, to booleans for each, True = kept.
      m: group size; divides the size of the axis.
      axes: `(-1,)` or `(-2,)`.
      as_mask: True returns the mask, False the values with zeros for those not kept.
      interpret: as in `pallas_call`; runs the kernel on other platforms.

    Raises:
      NotImplementedError: the kernel cannot take this shape, dtype, or pattern (see `misfit`).
    """
    if (reason := misfit(values.shape, values.dtype, m, axes)) is not None:
        raise NotImplementedError(f"the TPU kernel cannot compute masks of groups of {m}: {reason}")
    # A stack of matrices is one tall matrix: no group crosses from one into the next.
    matrix = values.reshape(-1, values.shape[-1])
    words_per_row = values.dtype.itemsize / 4
    along_lanes = axes == (-1,)
    unit = round(LANES / words_per_row) if along_lanes else SUBLANES * m
    if as_mask:  # Masks have tiles of 32 rows.
        unit = math.lcm(unit, 32)
    rows, columns = matrix.shape
    height = min(-(-rows // unit), max(1, _BLOCK_ROWS // unit)) * unit
    block = pl.BlockSpec((height, LANES), lambda i, j: (i, j))
    word = jnp.float32 if words_per_row == 1 else jnp.int32
    scratch = []
    if along_lanes or as_mask or word == jnp.int32:
        words = round(height * words_per_row)
        if along_lanes:
            words = math.gcd(words, _TILES * LANES)
        scratch = [pltpu.VMEM((words, LANES), word)]
    result = jax.ShapeDtypeStruct(matrix.shape, jnp.int8 if as_mask else matrix.dtype)
    kept = pl.pallas_call(
        functools.partial(
            _keep_block, choose=choose, m=m, along_lanes=along_lanes, as_mask=as_mask
        ),
        out_shape=result,
        grid=(pl.cdiv(rows, height), pl.cdiv(columns, LANES)),
        in_specs=[block],
        out_specs=block,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=matrix.size * m,
            transcendentals=0,
            bytes_accessed=matrix.size * (matrix.dtype.itemsize + result.dtype.itemsize),
        ),
        interpret=interpret,
        name=f"nm_{'mask' if as_mask else 'prune'}_{m}",
    )(matrix)
    # Pallas would store booleans as 32-bit integers.
    return (kept.astype(jnp.bool_) if as_mask else kept).reshape(values.shape)


def _keep_block(
    x_ref: Any,
    out_ref: Any,
    scratch: Any = None,
    *,
    choose: Choose,
    m: int,
    along_lanes: bool,
    as_mask: bool,
) -> None:
    """The kernel's body: a block of 128 columns and whole groups."""
    packed = x_ref.dtype.itemsize == 2
    keep = functools.partial(
        _keep_words,
        choose=choose,
        rows_compete=not along_lanes,
        ones=(np.int32(0x3F803F80) if packed else np.float32(1)) if as_mask else None,
    )
    source = x_ref.bitcast(jnp.int32) if packed else x_ref

    def finish(words: jax.Array, rows: Any = slice(None)) -> None:
        kept = pltpu.bitcast(words, x_ref.dtype)
        out_ref[rows, :] = (kept.astype(jnp.float32) != 0).astype(jnp.int8) if as_mask else kept

    if along_lanes:
        _each_transposed(source, scratch, functools.partial(_each_strided, m, keep), finish)
    elif scratch is None:
        _each_strided(m, keep, source, out_ref)
    else:
        _each_strided(m // 2 if packed else m, keep, source, scratch)
        finish(scratch[...])


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
    ones: np.generic | None,
) -> list[jax.Array]:
    """The words with zeros for what is not kept; `ones` replaces the values that are."""
    values = words if ones is None else [jnp.full_like(word, ones) for word in words]
    if words[0].dtype == jnp.float32:
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
