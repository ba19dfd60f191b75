"""Transposable masks: N:M along two axes at once, so a weight and its transpose are both sparse.

A training step multiplies by the weight in the forward pass and by its transpose in the backward
pass. With a transposable mask, N:M hardware can speed up both.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.masks.arguments import check_n_of_m, is_integer
from nmjax.masks.ranking import check_real_floating
from nmjax.masks.scores import Score, as_array, magnitude, score_weights
from nmjax.masks.shards import check_shards
from nmjax.masks.tiles import keep_in_tiles

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int, Shaped

# Larger tiles have too many patterns to try: 4:8 has 1.2e11.
_SMALL = 4


def transposable_mask(
    w: Float[ArrayLike, "*shape"],
    n: int = 2,
    m: int = 4,
    axes: tuple[int, int] = (-2, -1),
    *,
    score: Score = magnitude,
) -> Bool[Array, "*shape"]:
    """Keeps n of every m weights along both axes, with the highest possible sum of scores.

    Up to m = 4, every m x m tile is optimal: all its patterns are tried (there are 90 for 2:4).
    Larger tiles are solved approximately, by TSENOR: for Gaussian weights the sum was within 0.01%
    of the optimum at 4:8, 0.02% at 8:16 and 0.03% at 2:8. A row or column may keep fewer than n.
    This takes 400 rounds over the weights, so refresh such masks now and then, not every step.

    Sums are computed in float32 (float64 for float64 scores). Ties are always resolved the same
    way. NaN counts as the highest score.

    Args:
      w: weights, real floating dtype.
      n: how many of each group are kept, 1 <= n <= m.
      m: group size; divides the sizes of both axes.
      axes: the two axes of the tiles.
      score: function from the weights to scores of the same shape, real floating dtype.

    Returns:
      Boolean array of `w`'s shape, True = kept. If every shard of `w` holds whole tiles, the mask
      is computed without communication.

    Raises:
      TypeError: `w` or its scores are not real floating point; `n` or `m` is not an integer.
      ValueError: not 1 <= n <= m; `axes` are not two different axes of `w`; `m` does not
        divide their sizes; a shard along an explicit mesh axis holds part of a tile.

    Source: the masks of Hubara et al., "Accelerated Sparse Neural Training: A Provable and
    Efficient Method to Find N:M Transposable Masks", NeurIPS 2021. The exhaustive search is from
    Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024. For large
    tiles, Meng et al., "TSENOR: Highly-Efficient Algorithm for Finding Transposable N:M Sparse
    Masks", NeurIPS 2025.

    >>> w = jnp.array([[4.0, 3, 2, 1], [3, 4, 1, 2], [9, 9, 1, 1], [9, 9, 1, 1]])
    >>> transposable_mask(w).astype(int).tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    """
    w = as_array(w)
    check_n_of_m(n, m)
    check_real_floating("weights", w.dtype)
    rows, columns = _tile_axes(w, m, axes)
    scores = lax.stop_gradient(score_weights(w, score))
    check_real_floating("scores", scores.dtype)

    order = [*(axis for axis in range(w.ndim) if axis not in (rows, columns)), rows, columns]
    moved = scores.transpose(order)
    *stack, height, width = moved.shape
    # Split one axis per reshape: explicit sharding cannot follow a reshape that splits two.
    tiles = moved.reshape(*stack, height, width // m, m)
    tiles = tiles.reshape(*stack, height // m, m, width // m, m).swapaxes(-3, -2)
    kept = _best_tiles(tiles, n) if m <= _SMALL else keep_in_tiles(_finite(tiles, m * m), n)
    mask = kept.reshape(tiles.shape).swapaxes(-3, -2).reshape(*stack, height, width // m, m)
    mask = mask.reshape(moved.shape)
    return mask.transpose(np.argsort(order))


def _best_tiles(tiles: Float[Array, "*tiles m m"], n: int) -> Bool[Array, "*tiles size"]:
    m = tiles.shape[-1]
    patterns = _patterns(n, m)
    best = _best(tiles.reshape(*tiles.shape[:-2], m * m), patterns)
    return _look_up(patterns, best)


def _finite(scores: Float[Array, "*shape"], size: int) -> Float[Array, "*shape"]:
    """Scores in float32 or wider, clipped so that `size` of them have a finite sum."""
    # A sum with an infinity is infinite whatever else is kept, and a sum with a NaN is NaN, even if
    # the pattern drops it: NaN * 0 is NaN.
    dtype = scores.dtype if scores.dtype.itemsize >= 4 else jnp.float32
    most = float(jnp.finfo(dtype).max) / size
    return jnp.where(jnp.isnan(scores), most, scores.astype(dtype)).clip(-most, most)


def _best(
    tiles: Float[Array, "*tiles size"], patterns: Bool[np.ndarray, "patterns size"]
) -> Int[Array, "*tiles"]:
    """Index of the pattern that keeps the highest sum of each tile; size is m * m."""
    tiles = _finite(tiles, patterns.shape[1])
    # One matmul tries all patterns on all tiles. At default precision TPUs would round the scores
    # to bfloat16 and pick a pattern that is not the best.
    sums = jnp.matmul(tiles, patterns.T.astype(tiles.dtype), precision=lax.Precision.HIGHEST)
    return jnp.argmax(sums, axis=-1)


def _look_up(
    patterns: Bool[np.ndarray, "patterns size"], at: Int[Array, "*tiles"]
) -> Bool[Array, "*tiles size"]:
    """`patterns[at]`, without a gather."""
    # Explicit sharding cannot follow a gather, so compare every tile's index with all indices and
    # sum. Each pattern is packed into one integer first, a bit for each entry: the sum then runs
    # over 90 integers per tile for 2:4, and not over 90 x 16 booleans.
    bits = np.arange(patterns.shape[1], dtype=np.int32)
    codes = (patterns << bits).sum(axis=1).astype(np.int32)

    def along_last(values: np.ndarray) -> np.ndarray:
        return values.reshape((1,) * at.ndim + values.shape)

    chosen = at[..., None] == along_last(np.arange(len(codes), dtype=at.dtype))
    code = jnp.sum(jnp.where(chosen, along_last(codes), 0), axis=-1, dtype=jnp.int32)
    return (code[..., None] >> along_last(bits)) & 1 == 1


@functools.cache
def _patterns(n: int, m: int) -> Bool[np.ndarray, "patterns size"]:
    """All m x m tiles with n True in every row and column, flattened."""
    rows = [np.isin(np.arange(m), kept).astype(int) for kept in itertools.combinations(range(m), n)]
    tiles = (np.array(tile) for tile in itertools.product(rows, repeat=m))
    return np.array([tile.ravel() for tile in tiles if (tile.sum(axis=0) == n).all()], bool)


def _tile_axes(w: Shaped[Array, "*shape"], m: int, axes: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(axes, tuple | list) or not all(map(is_integer, axes)):
        raise TypeError(f"axes must be two integers, such as (-2, -1); got {axes!r}")
    if len(axes) != 2 or any(not -w.ndim <= axis < w.ndim for axis in axes):
        raise ValueError(f"axes must be two axes of weights of shape {w.shape}, got {axes}")
    rows, columns = (axis % w.ndim for axis in axes)
    if rows == columns:
        raise ValueError(f"axes {axes} are the same axis of weights of shape {w.shape}")
    if w.shape[rows] % m or w.shape[columns] % m:
        raise ValueError(
            f"tiles of {m} x {m} do not fit weights of shape {w.shape} along axes {axes}; keep "
            "this layer dense, or mask a single axis with nmjax.nm_mask"
        )
    for axis in (rows, columns):
        check_shards(w, m, (axis,), f"tiles of {m} x {m} along axes {axes}")
    return rows, columns
