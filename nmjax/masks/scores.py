"""Scores: how important a weight, or a block of weights, is.

A weight score is a function from the weight array to an array of the same shape. A block score is
a function from blocks (*stack, rows, inputs, block), as `nmjax.masks.blocks` cuts them, to scores
(*stack, rows, inputs). A row holds the blocks of the same output channels, one for each input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

if TYPE_CHECKING:
    import chex
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Shaped

Score = Callable[[jax.Array], jax.Array]
BlockScore = Callable[[jax.Array], jax.Array]

# How many cosines BPAR holds at a time (a single row may need more): 4 MiB, about a CPU's cache.
_SIMILARITIES = 2**20


def magnitude(w: Float[chex.Array, "*shape"]) -> Float[Array, "*shape"]:
    """Absolute value: the score of every N:M method compared in the original paper.

    >>> magnitude(jnp.array([-2.0, 0.5])).tolist()
    [2.0, 0.5]
    """
    return jnp.abs(as_array(w))


def as_array(x: ArrayLike, what: str = "weights") -> jax.Array:
    """An array of JAX; raises TypeError if `x` is not an array of numbers."""
    if not hasattr(x, "dtype"):
        try:
            is_numeric = np.asarray(x).dtype.kind in "biufc"
        except ValueError:  # Lists of different lengths.
            is_numeric = False
        if not is_numeric:
            raise TypeError(f"expected an array of {what}, got {type(x).__name__}")
    elif isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(
            f"expected an array of {what}, got a ShapeDtypeStruct, which has no values: {x.dtype}"
            f"{x.shape}; for the shape of a result, call jax.eval_shape"
        )
    elif jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(f"expected an array of {what}, got a random key of shape {jnp.shape(x)}")
    return jnp.asarray(x)


def check_score(score: Score) -> None:
    """Raises TypeError unless `score` is a function."""
    if not callable(score):
        raise TypeError(
            "score must be a function from weights to scores, such as nmjax.magnitude; got "
            f"{score!r}"
        )


def score_weights(w: Float[chex.Array, "*shape"], score: Score) -> Shaped[chex.Array, "*shape"]:
    """Applies `score`; raises ValueError if the scores do not have the shape of `w`."""
    check_score(score)
    scores = score(w)
    if not hasattr(scores, "shape"):
        raise TypeError(
            f"score must return an array with one number per weight, got {type(scores).__name__}"
        )
    if scores.shape != w.shape:
        raise ValueError(
            f"score must return one number per weight: weights have shape {w.shape}, scores have "
            f"shape {scores.shape}"
        )
    return scores


def block_sum(blocks: Float[chex.Array, "*blocks block"]) -> Float[Array, "*blocks"]:
    """Sum of each block, in float32 or wider: for blocks that hold scores of weights."""
    return jnp.sum(_wide(blocks), axis=-1)


def block_l1(blocks: Float[chex.Array, "*blocks block"]) -> Float[Array, "*blocks"]:
    """L1 norm of each block, the score of the 1xN paper.

    >>> block_l1(jnp.array([[[3.0, -4.0], [1.0, 0.0]]])).tolist()
    [[7.0, 1.0]]
    """
    return block_sum(jnp.abs(_wide(blocks)))


def block_l2(blocks: Float[chex.Array, "*blocks block"]) -> Float[Array, "*blocks"]:
    """L2 norm of each block.

    >>> block_l2(jnp.array([[[3.0, -4.0], [1.0, 0.0]]])).tolist()
    [[5.0, 1.0]]
    """
    return jnp.sqrt(block_sum(_wide(blocks) ** 2))


def block_angular_redundancy(
    blocks: Float[chex.Array, "*rows inputs block"],
    alpha: chex.Numeric = 1.0,
    kept: Bool[chex.Array, "*rows inputs"] | None = None,
) -> Float[Array, "*rows inputs"]:
    """BPAR: blocks that are large and unlike the other blocks of their row score high.

    For the blocks B_c of a row, with sums over the whole row:

        score_c = |B_c|_1 / sum_d |B_d|_1  -  alpha * a_c / sum_d a_d,
        a_c = sum_d |cos(B_c, B_d)|

    A block of zeros scores `-alpha`, the lowest possible value. Computed in float32 or wider.

    Args:
      blocks: (*stack, rows, inputs, block).
      alpha: weight of the redundancy; 1 in the paper's code.
      kept: the blocks whose angles count, True = kept; all by default. The redundancy of the
        others counts as the whole row's, as that of zeros.

    Source: Xiang et al., "SUBP: Soft Uniform Block Pruning", NeurIPS 2023, section 3.2, and
    `utils/prune_criterion.py` of JingyangXiang/SUBP.

    >>> row = jnp.array([[[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    >>> [f"{score:.2f}" for score in block_angular_redundancy(row).ravel().tolist()]
    ['0.10', '-0.15', '0.05', '-1.00']
    """
    blocks = _gathered(_wide(blocks))
    norm = block_l2(blocks)[..., None]
    if kept is not None:
        norm = jnp.where(_gathered(kept)[..., None], norm, 0)
    directions = jnp.where(norm > 0, blocks / jnp.where(norm > 0, norm, 1), 0)
    redundancy = _share(_similarity(directions))
    size = _share(block_l1(blocks))
    # A zero block is orthogonal to every block, itself included, and so looks perfectly distinct.
    # Keeping it gains nothing, so its redundancy counts as the whole row's.
    return size - alpha * jnp.where(redundancy == 0, 1, redundancy)


_BLOCK_SCORES: dict[str, BlockScore] = {
    "l1": block_l1,
    "l2": block_l2,
    "bpar": block_angular_redundancy,
}


def block_score(score: str | BlockScore) -> BlockScore:
    """Looks up a block score by name; returns a function unchanged.

    Raises:
      TypeError: `score` is neither a string nor a function.
      ValueError: no score has that name.
    """
    if callable(score):
        return score
    if not isinstance(score, str):
        raise TypeError(f"a block score must be a name or a function, got {score!r}")
    if score not in _BLOCK_SCORES:
        raise ValueError(
            f"unknown block score {score!r}; the known scores are {', '.join(_BLOCK_SCORES)}"
        )
    return _BLOCK_SCORES[score]


def _similarity(directions: Float[Array, "*rows inputs block"]) -> Float[Array, "*rows inputs"]:
    """Sums each unit vector's absolute cosines with the vectors of its row, itself included."""
    *rows, inputs, size = directions.shape

    def of_row(row: Float[Array, "inputs block"]) -> Float[Array, " inputs"]:
        # Full precision: TPUs would otherwise multiply in bfloat16, too coarse to rank by.
        cosines = jnp.matmul(row, row.T, precision=lax.Precision.HIGHEST)
        return jnp.sum(jnp.abs(cosines), axis=-1)

    # All rows at once would hold rows * inputs^2 cosines, so the loop takes a few rows at a time.
    at_a_time = max(1, _SIMILARITIES // max(inputs, 1) ** 2)
    sums = lax.map(of_row, directions.reshape(math.prod(rows), inputs, size), batch_size=at_a_time)
    return sums.reshape(*rows, inputs)


def _share(values: Float[Array, "*rows inputs"]) -> Float[Array, "*rows inputs"]:
    """Each value's share of its row's sum; 0 in a row of zeros."""
    total = jnp.sum(values, axis=-1, keepdims=True)
    return values / jnp.where(total > 0, total, 1)


def _wide(x: Float[chex.Array, "*shape"]) -> Float[chex.Array, "*shape"]:
    """Converts narrow floats to float32, the dtype of the sums."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _gathered(x: Shaped[chex.Array, "*shape"]) -> Shaped[chex.Array, "*shape"]:
    """Replicates `x` on a mesh with explicit axes."""
    # `lax.map` loops over rows, and explicit sharding does not allow a loop over a sharded axis.
    spec = jax.typeof(x).sharding.spec
    if all(axis is None for axis in spec):
        return x
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec())
