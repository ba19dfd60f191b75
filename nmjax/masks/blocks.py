"""Masks of 1xN patterns: the blocks with the highest scores are kept.

A block is N consecutive output channels at one input channel, with all taps of a convolution.
`split_blocks` turns a weight into an array (*stack, rows, inputs, block): the last axis holds the
weights of one block, and a row holds the blocks of the same N outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.layouts.axes import Axes, given_axes, size_along
from nmjax.masks.arguments import check_block, kept_blocks
from nmjax.masks.ranking import check_real_floating, keep_highest, signed_keys
from nmjax.masks.scores import BlockScore, as_array, block_score
from nmjax.masks.shards import check_shards
from nmjax.trees.spans import Span, merge, split

if TYPE_CHECKING:
    import chex
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Shaped


def block_mask(
    w: Float[ArrayLike, "*shape"],
    n: int,
    sparsity: float,
    score: str | BlockScore = "l1",
    *,
    uniform: bool = True,
    kept: chex.Numeric | None = None,
    reduction_axes: int | Sequence[int] = -2,
    output_axes: int | Sequence[int] = -1,
    tap_axes: Sequence[int] | None = None,
) -> Bool[Array, "*shape"]:
    """Keeps the blocks with the highest scores, a fixed number per row or per layer.

    In a tie, the block at the lower index is kept: the lower input within a row, and the lower row
    first if rows compete. NaN counts as the highest score, so that it stays visible.

    Args:
      w: weights, real floating dtype, in any layout; (*taps, in, out) by default.
      n: output channels per block; divides the size of `output_axes`.
      sparsity: fraction of the blocks to drop, as in `nmjax.Block1xN`.
      score: `"l1"`, `"l2"`, `"bpar"` (see `nmjax.masks.scores`), or a function from blocks
        (*stack, rows, inputs, block) to scores (*stack, rows, inputs).
      uniform: True if every row of blocks drops the same number, False if all blocks of the layer
        compete.
      kept: how many blocks are kept in each row, or in the layer; overrides `sparsity` and may be
        traced.
      reduction_axes: axes that the matmul sums over, flattened in the order given.
      output_axes: axes that the matmul keeps, flattened in the order given; blocks extend along
        them.
      tap_axes: axes that every block spans; by default all others. Axes in none of the three
        arguments hold a stack of weights.

    Returns:
      Boolean array of `w`'s shape, True = kept.

    Raises:
      TypeError: `w` is not real floating point; `n` or an axis is not an integer; `sparsity` is
        not a number.
      ValueError: `n` does not divide the outputs; not 0 <= sparsity < 1; an axis is out of range
        or given twice; the score is unknown or returns the wrong shape; a shard along an explicit
        mesh axis holds part of a block.

    Source: Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks", TPAMI 2022, section
    3 (`uniform=False`); Xiang et al., "SUBP", NeurIPS 2023, section 3 (`uniform=True`).

    >>> w = jnp.array([[3.0, 3.0, 0.0, 9.0], [1.0, 1.0, 2.0, 2.0]])  # Two inputs, four outputs.
    >>> block_mask(w, 2, 0.5).astype(int).tolist()
    [[1, 1, 1, 1], [0, 0, 0, 0]]
    >>> block_mask(w.at[0, 3].set(0), 2, 0.5).astype(int).tolist()
    [[1, 1, 0, 0], [0, 0, 1, 1]]
    """
    # Masks have no gradient. Without this, autodiff would still trace through the scores.
    w = lax.stop_gradient(as_array(w))
    check_block(n, sparsity)
    if not isinstance(uniform, bool):
        raise TypeError(f"uniform must be True or False, got {uniform!r}")
    axes = _named_axes(w.ndim, reduction_axes, output_axes, tap_axes)
    n, sparsity = operator.index(n), float(sparsity)
    return _mask(w, kept, n, sparsity, uniform, axes, block_score(score))


@partial(jax.jit, static_argnames=("n", "sparsity", "uniform", "axes", "score"), inline=True)
def _mask(
    w: Float[Array, "*shape"],
    kept: chex.Numeric | None,
    n: int,
    sparsity: float,
    uniform: bool,
    axes: Axes,
    score: BlockScore,
) -> Bool[Array, "*shape"]:
    """The mask of checked arguments. Jitted, so it is one computation outside `jax.jit` too."""
    scores = score_blocks(w, n, axes, score)
    if kept is None:
        rows, inputs = scores.shape[-2:]
        kept = kept_blocks(sparsity, inputs if uniform else rows * inputs)
    flags = keep_blocks(scores, kept, uniform=uniform)
    return spread_blocks(flags, w.shape, n, axes)


def score_blocks(
    w: Float[chex.Array, "*shape"], n: int, axes: Axes, score: BlockScore
) -> Float[Array, "*stack rows inputs"]:
    """The score of each block. Arguments and errors as in `block_mask`."""
    check_real_floating("weights", w.dtype)
    blocks = split_blocks(w, n, axes)
    scores = score(blocks)
    if not hasattr(scores, "shape"):
        raise TypeError(
            f"score must return an array with one number per block, got {type(scores).__name__}"
        )
    if scores.shape != blocks.shape[:-1]:
        raise ValueError(
            f"score must return one number per block: blocks have shape {blocks.shape}, scores "
            f"have shape {scores.shape}"
        )
    check_real_floating("scores", scores.dtype)
    return scores


def keep_blocks(
    scores: Float[Array, "*stack rows inputs"], kept: chex.Numeric, *, uniform: bool = True
) -> Bool[Array, "*stack rows inputs"]:
    """Keeps the blocks with the highest scores.

    Args:
      scores: real floating dtype.
      kept: how many are kept, in each row if `uniform`, otherwise in each layer; may be traced.
      uniform: whether the blocks of a row compete, or those of a layer.
    """
    competing = (scores.ndim - 1,) if uniform else (scores.ndim - 2, scores.ndim - 1)
    return keep_highest(scores, signed_keys, kept, competing)


def split_blocks(
    w: Shaped[chex.Array, "*shape"], n: int, axes: Axes
) -> Shaped[chex.Array, "*stack rows inputs block"]:
    """Cuts a weight into blocks.

    Args:
      w: weights of any dtype.
      n: output channels per block.
      axes: negative axes of `w`; the others hold a stack.

    Returns:
      The blocks, with the weights of each in the order (*taps, output).

    Raises:
      ValueError: `n` does not divide the outputs; a shard along an explicit mesh axis holds part
        of a block.
    """
    outputs = size_along(w.shape, axes.output)
    if outputs % n:
        raise ValueError(
            f"blocks of {n} outputs do not fit: weights of shape {w.shape} have {outputs} along "
            f"the output axes {axes.output}, which {n} does not divide; choose another n or keep "
            "this layer dense"
        )
    positive = tuple(axis % w.ndim for axis in axes.output)
    check_shards(w, n, positive, f"blocks of {n} along axes {axes.output}")
    *stack, taps, inputs, _ = (merged := merge(w, _spans(axes))).shape
    # Taps stay in front until the outputs are cut: jax 0.10 cannot split a sharded axis that an
    # axis of size 1 follows.
    blocks = merged.reshape(*stack, taps, inputs, outputs // n, n).swapaxes(-4, -2)
    return blocks.reshape(*stack, outputs // n, inputs, taps * n)


def spread_blocks(
    flags: Shaped[Array, "*stack rows inputs"], shape: tuple[int, ...], n: int, axes: Axes
) -> Shaped[Array, "*weights"]:
    """Repeats one flag per block for every weight of the block.

    Args:
      flags: any dtype.
      shape: shape of the weight.
      n: output channels per block.
      axes: negative axes of the weight.

    Returns:
      Array of the given shape and the flags' dtype.
    """
    *stack, rows, inputs = flags.shape
    taps = size_along(shape, axes.taps or ())
    # (*stack, 1, inputs, rows, 1): the axes of `merge`, with one entry for all taps and outputs of
    # a block.
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
    # Without tap axes, every axis is the weight's own and none is a stack.
    named = (*axes.reduction, *axes.output)
    return axes._replace(taps=tuple(axis for axis in range(-ndim, 0) if axis not in named))


def _as_tuple(axes: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(axes) if isinstance(axes, Sequence) else (axes,)
