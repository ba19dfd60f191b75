"""Tiles that keep n of m in every row and column, where there are too many patterns to try.

The best tile is a transport problem. Entropy makes it smooth: maximize <S, |W|> + H(S) / tau over
0 <= S <= 1 whose rows and columns sum to n. Dykstra's projections solve that by scaling rows and
columns in turn. Rounding takes the entries of S one by one, and swaps fill what is left.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Shaped

# Measured on Gaussian tiles, against the exact optimum. A high tau makes the choice sharp but takes
# many rounds from a cold start, so tau doubles on the way: 50, 100, 200, 400.
_FIRST_TAU = 50.0
_STAGES = 4
_ROUNDS = 100
_SWAPS = 10


@partial(jax.jit, static_argnames="n", inline=True)
def keep_in_tiles(scores: Float[Array, "*tiles m m"], n: int) -> Bool[Array, "*tiles m m"]:
    """Keeps at most n in every row and column of each tile, close to the highest sum.

    Args:
      scores: finite.
      n: how many are kept, 1 <= n <= m.

    Source: Meng et al., "TSENOR: Highly-Efficient Algorithm for Finding Transposable N:M Sparse
    Masks", NeurIPS 2025. Its constants are not public; ours are measured.
    """
    # From 0 to 1 in each tile. A constant changes no choice between full tiles.
    scores = scores - jnp.minimum(jnp.min(scores, axis=(-2, -1), keepdims=True), 0)
    size = jnp.max(scores, axis=(-2, -1), keepdims=True)
    scores = scores / jnp.where(size > 0, size, 1)
    kept = _rounded(_transport(scores, n), n)
    return lax.fori_loop(0, _SWAPS, lambda _, kept: _swapped(scores, kept, n), kept)


def _transport(scores: Float[Array, "*tiles m m"], n: int) -> Float[Array, "*tiles m m"]:
    """The logarithm of S. In logarithms nothing over- or underflows at a high tau."""

    def one_round(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        log_s, correction = carry
        for axis in (-1, -2):
            log_s = log_s + jnp.log(n) - logsumexp(log_s, axis=axis, keepdims=True)
        # Dykstra: what a cap took away is given back before the next cap.
        before = log_s + correction
        capped = jnp.minimum(before, 0)
        return capped, before - capped

    def one_stage(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # log S is tau |W| and multiples of tau for each row and column: doubling it doubles tau.
        doubled = jax.tree.map(lambda x: 2 * x, carry)
        return lax.fori_loop(0, _ROUNDS, one_round, doubled)

    start = _FIRST_TAU / 2 * scores, jnp.zeros_like(scores)
    return lax.fori_loop(0, _STAGES, one_stage, start)[0]


def _rounded(log_s: Float[Array, "*tiles m m"], n: int) -> Bool[Array, "*tiles m m"]:
    """Takes the highest entry that still has room in its row and its column, again and again."""
    m = log_s.shape[-1]

    def take(_: int, kept: jax.Array) -> jax.Array:
        room = ~kept
        for axis in (-1, -2):
            room &= jnp.sum(kept, axis=axis, keepdims=True) < n
        return kept | (_highest(jnp.where(room, log_s, -jnp.inf)) & room)

    return lax.fori_loop(0, n * m, take, jnp.zeros_like(log_s, dtype=bool))


def _swapped(
    scores: Float[Array, "*tiles m m"], kept: Bool[Array, "*tiles m m"], n: int
) -> Bool[Array, "*tiles m m"]:
    """Takes out one entry and puts in two, in a row and a column with room, if that gains.

    Row i and column j have room. If (i', j') is kept, and (i, j') and (i', j) are not, then these
    two can take its place.
    """
    row = _highest(n - jnp.sum(kept, axis=-1, keepdims=True))  # (m, 1): row i
    column = _highest(n - jnp.sum(kept, axis=-2, keepdims=True))  # (1, m): column j
    free = jnp.where(kept, -jnp.inf, scores)
    into_row = jnp.max(jnp.where(row, free, -jnp.inf), axis=-2, keepdims=True)  # (i, j') by j'
    into_column = jnp.max(jnp.where(column, free, -jnp.inf), axis=-1, keepdims=True)
    gain = jnp.where(kept, into_row + into_column - scores, -jnp.inf)
    has_room = jnp.sum(kept, axis=(-2, -1), keepdims=True) < n * scores.shape[-1]
    out = _highest(gain) & (gain > 0) & has_room
    put_in = (row & jnp.any(out, axis=-2, keepdims=True)) | (
        column & jnp.any(out, axis=-1, keepdims=True)
    )
    return (kept & ~out) | put_in


def _highest(values: Shaped[Array, "*tiles rows columns"]) -> Bool[Array, "*tiles rows columns"]:
    """True at the first of the highest entries of each tile."""
    *tiles, rows, columns = values.shape
    flat = values.reshape(*tiles, rows * columns)
    best = jnp.argmax(flat, axis=-1, keepdims=True)
    # Compared, not gathered: explicit sharding cannot follow a gather.
    place = lax.broadcasted_iota(best.dtype, flat.shape, flat.ndim - 1)
    return (place == best).reshape(values.shape)
