"""Which blocks of a weight stay: the masks of 1xN patterns.

A block is N consecutive output channels at one input channel, with all taps of a convolution. Cut
into blocks a weight is an array (*stack, rows, inputs, block): the last axis holds the weights of
one block, and the blocks of the same N outputs are a row of blocks.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from nmjax.layouts import Axes, given_axes, size_along
from nmjax.masks.arguments import check_block, kept_blocks
from nmjax.masks.ranking import check_real_floating, keep_highest, signed_keys
from nmjax.masks.scores import BlockScore, block_score
from nmjax.masks.shards import check_shards
from nmjax.trees.spans import Span, merge, split


def block_mask(
    w: jax.Array,
    n: int,
    sparsity: float,
    score: str | BlockScore = "l1",
    *,
    uniform: bool = True,
    kept: ArrayLike | None = None,
    reduction_axes: int | Sequence[int] = -2,
    output_axes: int | Sequence[int] = -1,
    tap_axes: Sequence[int] | None = None,
) -> jax.Array:
    """Keeps the blocks with the highest scores: the same number in every row, or so many in all.

    Of equal scores the block at the lower index stays: the lower input in a row, and the lower row
    first where rows compete. NaN counts as the highest score, so that it stays visible.

    Args:
      w: weights, real floating dtype, in any layout; by default (*taps, in, out).
      n: output channels in a block; divides the size of `output_axes`.
      sparsity: fraction of the blocks that is dropped, as in `nmjax.Block1xN`.
      score: `"l1"`, `"l2"`, `"bpar"` (`nmjax.masks.scores`), or a function from blocks
        (*stack, rows, inputs, block) to scores (*stack, rows, inputs).
      uniform: whether each row of blocks drops the same number, or the blocks of the whole layer
        compete.
      kept: how many blocks stay in each row, or in the layer, instead of what `sparsity` says;
        may be traced.
      reduction_axes: axes that the matmul sums over, taken together in the order given.
      output_axes: axes that it keeps, taken together in the order given; blocks run along them.
      tap_axes: axes that a block takes whole; by default all others. Axes named nowhere hold a
        stack of weights.

    Returns:
      Boolean array of `w`'s shape, True = kept.

    Raises:
      TypeError: `w` is not real floating point; `n` or an axis not integer, `sparsity` no number.
      ValueError: `n` does not divide the outputs; not 0 <= sparsity < 1; an axis out of range or
        named twice; an unknown score, or scores of the wrong shape; in a mesh with explicit axes,
        a shard of `w` holds part of a block.

    Source: Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks", TPAMI 2022, section
    3 (`uniform=False`); Xiang et al., "SUBP", NeurIPS 2023, section 3 (`uniform=True`).

    >>> w = jnp.array([[3.0, 3.0, 0.0, 9.0], [1.0, 1.0, 2.0, 2.0]])  # Two inputs, four outputs.
    >>> block_mask(w, 2, 0.5).astype(int).tolist()
    [[1, 1, 1, 1], [0, 0, 0, 0]]
    >>> block_mask(w.at[0, 3].set(0), 2, 0.5).astype(int).tolist()
    [[1, 1, 0, 0], [0, 0, 1, 1]]
    """
    w = lax.stop_gradient(jnp.asarray(w))
    check_block(n, sparsity)
    if not isinstance(uniform, bool):
        raise TypeError(f"uniform must be True or False, got {uniform!r}")
    axes = _named_axes(w.ndim, reduction_axes, output_axes, tap_axes)
    n, sparsity = operator.index(n), float(sparsity)
    return _mask(w, kept, n, sparsity, uniform, axes, block_score(score))


@partial(jax.jit, static_argnames=("n", "sparsity", "uniform", "axes", "score"), inline=True)
def _mask(
    w: jax.Array,
    kept: ArrayLike | None,
    n: int,
    sparsity: float,
    uniform: bool,
    axes: Axes,
    score: BlockScore,
) -> jax.Array:
    """The mask as one computation also outside `jax.jit`."""
    scores = score_blocks(w, n, axes, score)
    if kept is None:
        rows, inputs = scores.shape[-2:]
        kept = kept_blocks(sparsity, inputs if uniform else rows * inputs)
    flags = keep_blocks(scores, kept, uniform=uniform)
    return spread_blocks(flags, w.shape, n, axes)


def score_blocks(w: jax.Array, n: int, axes: Axes, score: BlockScore) -> jax.Array:
    """The score of each block, (*stack, rows, inputs). Arguments and errors as `block_mask`."""
    check_real_floating("weights", w.dtype)
    blocks = split_blocks(w, n, axes)
    scores = score(blocks)
    if scores.shape != blocks.shape[:-1]:
        raise ValueError(
            f"score must give one importance for each block: blocks have shape {blocks.shape}, "
            f"scores have shape {scores.shape}"
        )
    check_real_floating("scores", scores.dtype)
    return scores


def keep_blocks(scores: jax.Array, kept: ArrayLike, *, uniform: bool = True) -> jax.Array:
    """The blocks with the highest scores.

    Args:
      scores: (*stack, rows, inputs), real floating dtype.
      kept: how many stay in each row, or in each layer; may be traced.
      uniform: whether each row keeps so many, or the layer.

    Returns:
      Boolean array of the scores' shape, True = kept.
    """
    competing = (scores.ndim - 1,) if uniform else (scores.ndim - 2, scores.ndim - 1)
    return keep_highest(scores, signed_keys, kept, competing)


def split_blocks(w: jax.Array, n: int, axes: Axes) -> jax.Array:
    """Cuts a weight into blocks.

    Args:
      w: weights of any dtype.
      n: output channels in a block.
      axes: negative axes of `w`; those not named hold a stack.

    Returns:
      Array (*stack, rows, inputs, block), where a block is in the order (*taps, output).

    Raises:
      ValueError: `n` does not divide the outputs, or shards of explicit axes cut blocks.
    """
    outputs = size_along(w.shape, axes.output)
    if outputs % n:
        raise ValueError(
            f"blocks of {n} outputs do not fit: weights of shape {w.shape} have {outputs} along "
            f"the output axes {axes.output}, which {n} does not divide; choose another n, or keep "
            "this layer dense"
        )
    positive = tuple(axis % w.ndim for axis in axes.output)
    check_shards(w, n, positive, f"blocks of {n} along axes {axes.output}")
    *stack, taps, inputs, _ = (merged := merge(w, _spans(axes))).shape
    # The taps in front: jax 0.10 cannot cut a sharded axis that an axis of size 1 follows.
    blocks = merged.reshape(*stack, taps, inputs, outputs // n, n).swapaxes(-4, -2)
    return blocks.reshape(*stack, outputs // n, inputs, taps * n)


def spread_blocks(flags: jax.Array, shape: tuple[int, ...], n: int, axes: Axes) -> jax.Array:
    """The mask of a weight from the flags of its blocks; undoes `split_blocks`.

    Args:
      flags: (*stack, rows, inputs).
      shape: of the weight.
      n: output channels in a block.
      axes: negative axes of the weight.

    Returns:
      Array of that shape, and of the flags' dtype.
    """
    *stack, rows, inputs = flags.shape
    taps = size_along(shape, axes.taps or ())
    flags = flags.swapaxes(-2, -1)[..., None, :, :, None]
    merged = jnp.broadcast_to(flags, (*stack, taps, inputs, rows, n))
    return split(merged.reshape(*stack, taps, inputs, rows * n), shape, _spans(axes))


def _spans(axes: Axes) -> tuple[Span, Span, Span]:
    return axes.taps or (), axes.reduction, axes.output


def _named_axes(
    ndim: int,
    reduction: int | Sequence[int],
    output: int | Sequence[int],
    taps: Sequence[int] | None,
) -> Axes:
    given = Axes(_as_tuple(reduction), _as_tuple(output), () if taps is None else _as_tuple(taps))
    axes = given_axes(given, ndim)
    if taps is not None:
        return axes
    named = (*axes.reduction, *axes.output)
    return axes._replace(taps=tuple(axis for axis in range(-ndim, 0) if axis not in named))


def _as_tuple(axes: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(axes) if isinstance(axes, Sequence) else (axes,)
