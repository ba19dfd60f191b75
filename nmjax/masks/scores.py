"""How much a weight, or a block of weights, matters.

The score of a weight is a function of the weight array, of the same shape. The score of a block is
a function of blocks (*stack, rows, inputs, block) as `nmjax.masks.blocks` cuts them; the result
lacks the last axis. A row holds the blocks of the same output channels, one for each input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Score = Callable[[jax.Array], jax.Array]
BlockScore = Callable[[jax.Array], jax.Array]

# Similarities that are held at a time, unless a single row has more: as many as a cache holds.
_SIMILARITIES = 2**20


def magnitude(w: jax.Array) -> jax.Array:
    """Absolute value: the score of every N:M method compared in the original paper.

    Args:
      w: weights, any shape, floating dtype.

    Returns:
      |w|, of `w`'s shape and dtype.

    >>> magnitude(jnp.array([-2.0, 0.5])).tolist()
    [2.0, 0.5]
    """
    return jnp.abs(w)


def score_weights(w: jax.Array, score: Score) -> jax.Array:
    """The importance of each weight.

    Raises:
      ValueError: the scores have another shape than `w`.
    """
    scores = score(w)
    if scores.shape != w.shape:
        raise ValueError(
            f"score must give one importance for each weight: weights have shape {w.shape}, "
            f"scores have shape {scores.shape}"
        )
    return scores


def block_sum(blocks: jax.Array) -> jax.Array:
    """Sum over each block, for blocks that hold importances already; at least float32."""
    return jnp.sum(_wide(blocks), axis=-1)


def block_l1(blocks: jax.Array) -> jax.Array:
    """L1 norm of each block: the score of 1xN.

    >>> block_l1(jnp.array([[[3.0, -4.0], [1.0, 0.0]]])).tolist()
    [[7.0, 1.0]]
    """
    return block_sum(jnp.abs(_wide(blocks)))


def block_l2(blocks: jax.Array) -> jax.Array:
    """L2 norm of each block.

    >>> block_l2(jnp.array([[[3.0, -4.0], [1.0, 0.0]]])).tolist()
    [[5.0, 1.0]]
    """
    return jnp.sqrt(block_sum(_wide(blocks) ** 2))


def block_angular_redundancy(blocks: jax.Array, alpha: float = 1.0) -> jax.Array:
    """BPAR: blocks that are large, and unlike the others of their row, score high.

    With B_c the blocks of a row, the sums running over the whole row:

        score_c = |B_c|_1 / sum_d |B_d|_1  -  alpha * a_c / sum_d a_d,
        a_c = sum_d |cos(B_c, B_d)|

    A block of zeros is orthogonal to everything and gets `-alpha`, so that it ranks last.

    Args:
      blocks: (*stack, rows, inputs, block).
      alpha: weight of the redundancy. The paper's code has 1.

    Returns:
      (*stack, rows, inputs), at least float32.

    Source: Xiang et al., "SUBP: Soft Uniform Block Pruning", NeurIPS 2023, section 3.2, and
    `utils/prune_criterion.py` of JingyangXiang/SUBP.

    >>> row = jnp.array([[[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    >>> [f"{score:.2f}" for score in block_angular_redundancy(row).ravel().tolist()]
    ['0.10', '-0.15', '0.05', '-1.00']
    """
    blocks = _gathered(_wide(blocks))
    norm = block_l2(blocks)[..., None]
    directions = jnp.where(norm > 0, blocks / jnp.where(norm > 0, norm, 1), 0)
    redundancy = _share(_similarity(directions))
    size = _share(block_l1(blocks))
    return size - alpha * jnp.where(redundancy == 0, 1, redundancy)


_BLOCK_SCORES: dict[str, BlockScore] = {
    "l1": block_l1,
    "l2": block_l2,
    "bpar": block_angular_redundancy,
}


def block_score(score: str | BlockScore) -> BlockScore:
    """The score of that name; a function comes back as it is.

    Raises:
      TypeError: neither text nor a function.
      ValueError: no score has that name.
    """
    if callable(score):
        return score
    if not isinstance(score, str):
        raise TypeError(f"a block score is a name or a function, got {score!r}")
    if score not in _BLOCK_SCORES:
        raise ValueError(
            f"no block score is called {score!r}; there are {', '.join(_BLOCK_SCORES)}"
        )
    return _BLOCK_SCORES[score]


def _similarity(directions: jax.Array) -> jax.Array:
    """Each unit vector's absolute cosines with those of its row, summed; itself included."""
    *rows, inputs, size = directions.shape

    def of_row(row: jax.Array) -> jax.Array:
        cosines = jnp.matmul(row, row.T, precision=lax.Precision.HIGHEST)
        return jnp.sum(jnp.abs(cosines), axis=-1)

    # All rows at once would hold rows * inputs^2 cosines.
    at_a_time = max(1, _SIMILARITIES // max(inputs, 1) ** 2)
    sums = lax.map(of_row, directions.reshape(math.prod(rows), inputs, size), batch_size=at_a_time)
    return sums.reshape(*rows, inputs)


def _share(values: jax.Array) -> jax.Array:
    """Each value's part of its row's sum; 0 where a row is all zero."""
    total = jnp.sum(values, axis=-1, keepdims=True)
    return values / jnp.where(total > 0, total, 1)


def _wide(x: jax.Array) -> jax.Array:
    """Narrow floats as float32, in which sums are taken."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _gathered(x: jax.Array) -> jax.Array:
    """In a mesh with explicit axes, `x` on every device: a loop over rows cannot be sharded."""
    spec = jax.typeof(x).sharding.spec
    if all(axis is None for axis in spec):
        return x
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec())
