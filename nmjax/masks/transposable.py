"""Masks that are N:M along two axes at once, so that a weight and its transpose both are sparse.

A training step multiplies by the weight in the forward pass and by its transpose in the backward
pass. With such a mask hardware for N:M can take both.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.masks.arguments import check_n_of_m
from nmjax.masks.ranking import check_real_floating
from nmjax.masks.scores import Score, magnitude, score_weights
from nmjax.masks.shards import check_shards


def transposable_mask(
    w: jax.Array,
    n: int = 2,
    m: int = 4,
    axes: tuple[int, int] = (-2, -1),
    *,
    score: Score = magnitude,
) -> jax.Array:
    """Keeps n of every m along both axes, where the scores kept of every m x m tile sum to most.

    Every tile is optimal: all its patterns are tried, of which 2:4 has 90. Sums are rounded to
    float32 (float64 for float64 scores); of sums that are equal then, one pattern is taken, the
    same every time. NaN counts as the highest score.

    Args:
      w: weights of any shape, real floating dtype.
      n: how many of each group are kept, 1 <= n <= m.
      m: group size, at most 4; divides the sizes of both axes.
      axes: of the tiles.
      score: `weights -> importance`, of the same shape, real floating dtype.

    Returns:
      Boolean array of `w`'s shape, True = kept; computed without communication if every shard of
      `w` holds whole tiles.

    Raises:
      TypeError: `w` or its score is not real floating point; `n` or `m` is not an integer.
      ValueError: not 1 <= n <= m <= 4; two different axes of `w` are needed; `m` does not divide
        their sizes; in a mesh with explicit axes, a shard of `w` holds part of a tile.

    Source: the masks of Hubara et al., "Accelerated Sparse Neural Training: A Provable and
    Efficient Method to Find N:M Transposable Masks", NeurIPS 2021; tried exhaustively, as for 2:4
    in Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024.

    >>> w = jnp.array([[4.0, 3, 2, 1], [3, 4, 1, 2], [9, 9, 1, 1], [9, 9, 1, 1]])
    >>> transposable_mask(w).astype(int).tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    """
    w = jnp.asarray(w)
    check_n_of_m(n, m)
    check_real_floating("weights", w.dtype)
    rows, columns = _tile_axes(w, m, axes)
    scores = lax.stop_gradient(score_weights(w, score))
    check_real_floating("scores", scores.dtype)

    order = [*(axis for axis in range(w.ndim) if axis not in (rows, columns)), rows, columns]
    moved = scores.transpose(order)
    *stack, height, width = moved.shape
    # One axis at a time: that much explicit sharding can follow.
    tiles = moved.reshape(*stack, height, width // m, m)
    tiles = tiles.reshape(*stack, height // m, m, width // m, m).swapaxes(-3, -2)
    patterns = _patterns(n, m)
    best = _best(tiles.reshape(*tiles.shape[:-2], m * m), patterns)
    kept = _look_up(patterns, best)
    mask = kept.reshape(tiles.shape).swapaxes(-3, -2).reshape(*stack, height, width // m, m)
    mask = mask.reshape(moved.shape)
    return mask.transpose(np.argsort(order))


def _best(tiles: jax.Array, patterns: np.ndarray) -> jax.Array:
    """Index of the pattern (patterns, m * m) that keeps most of each tile (..., m * m)."""
    dtype = jnp.promote_types(tiles.dtype, jnp.float32)
    # Infinities would sum to the same whatever else is kept, and NaN would win everywhere.
    most = float(jnp.finfo(dtype).max) / patterns.shape[1]
    tiles = jnp.where(jnp.isnan(tiles), most, tiles.astype(dtype)).clip(-most, most)
    sums = jnp.matmul(tiles, patterns.T.astype(dtype), precision=lax.Precision.HIGHEST)
    return jnp.argmax(sums, axis=-1)


def _look_up(patterns: np.ndarray, at: jax.Array) -> jax.Array:
    """`patterns[at]`, without the gather, which explicit sharding cannot follow."""
    bits = np.arange(patterns.shape[1])
    codes = (patterns << bits).sum(axis=1).astype(np.int32)
    chosen = at[..., None] == np.arange(len(codes))
    code = jnp.sum(jnp.where(chosen, codes, 0), axis=-1, dtype=jnp.int32)
    return (code[..., None] >> bits) & 1 == 1


@functools.cache
def _patterns(n: int, m: int) -> np.ndarray:
    """All 0/1 tiles with n ones in every row and column: booleans (patterns, m * m)."""
    rows = [np.isin(np.arange(m), kept).astype(int) for kept in itertools.combinations(range(m), n)]
    tiles = (np.array(tile) for tile in itertools.product(rows, repeat=m))
    return np.array([tile.ravel() for tile in tiles if (tile.sum(axis=0) == n).all()], bool)


def _tile_axes(w: jax.Array, m: int, axes: tuple[int, int]) -> tuple[int, int]:
    if m > 4:
        raise ValueError(f"tiles of {m} x {m} have too many patterns to try; m is at most 4")
    if len(axes) != 2 or any(not -w.ndim <= axis < w.ndim for axis in axes):
        raise ValueError(f"axes must be two axes of weights of shape {w.shape}, got {axes}")
    rows, columns = (axis % w.ndim for axis in axes)
    if rows == columns:
        raise ValueError(f"axes {axes} are the same axis of weights of shape {w.shape}")
    if w.shape[rows] % m or w.shape[columns] % m:
        raise ValueError(
            f"tiles of {m} x {m} do not fit weights of shape {w.shape} along axes {axes}; keep "
            "this layer dense, or mask one axis only with nmjax.nm_mask"
        )
    for axis in (rows, columns):
        check_shards(w, m, (axis,), f"tiles of {m} x {m} along axes {axes}")
    return rows, columns
