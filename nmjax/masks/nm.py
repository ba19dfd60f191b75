"""Which weights stay: importance scores and an N:M pattern give a boolean mask.

A mask is True where a weight is kept. It is a pure function of the weights, takes tracers, and
is not differentiated: gradient rules live in `nmjax.straight_through`.

Scores are compared as integers that sort in the same order, so that NaN, infinities, -0.0 and
denormal numbers need no special case. Three formulations stand on them. All are exact, and none
sorts, gathers or rolls an array:

- m <= 4: count who in the group beats me. One pass, and nothing is stored beside the mask.
- m <= 32: a sorting network over the m members of a group, of which only what leads to the n-th
  is computed; then one bit for each member that stays, 4 bytes a group. (On CPUs, which have no
  16-bit slices, XLA also widens narrow weights into a float32 copy for m above 8.)
- any m: bisect the integers for the n-th highest score, then for the last tie that fits. About
  40 passes whatever m is, over one stored copy of the integers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.masks.arguments import check_n_of_m
from nmjax.masks.ranking import (
    ToKeys,
    check_real_floating,
    index,
    keep_highest,
    magnitude_keys,
    signed_keys,
    slices,
)
from nmjax.masks.scores import Score, magnitude, score_weights
from nmjax.masks.shards import check_shards


def nm_mask(
    w: jax.Array,
    n: int,
    m: int,
    axis: int | Sequence[int] = -2,
    *,
    score: Score = magnitude,
) -> jax.Array:
    """Keeps exactly the n highest scores of every m consecutive weights along `axis`.

    Of equal scores the one at the lower index stays. NaN counts as the highest score, whatever
    its payload or sign, so that it stays visible; -0.0 equals 0.0.

    Args:
      w: weights of any shape, real floating dtype.
      n: how many of each group are kept, 1 <= n <= m.
      m: group size; divides the size of `axis`.
      axis: where groups run. Several axes are first taken together in the order given, the last
        one varying fastest: `(-3, -2)` for the (heads, head_dim) of an attention output kernel,
        `(-2, -4, -3)` for the (I, H, W) of a convolution kernel stored as HWIO.
      score: `weights -> importance`, of the same shape, real floating dtype.

    Returns:
      Boolean array of `w`'s shape, True = kept. If every shard of `w` holds whole groups, it is
      sharded like `w` and computed without communication.

    Raises:
      TypeError: `w` or its score is not real floating point; `n`, `m` or `axis` not integer.
      ValueError: not 1 <= n <= m; `axis` out of range or repeated; `m` does not divide the size
        of `axis`; the score has another shape than `w`; in a mesh with explicit axes, a shard of
        `w` holds part of a group.

    Example:
      >>> w = jnp.array([0.1, -3.0, 2.0, 0.5])
      >>> nm_mask(w, 2, 4, axis=0).tolist()
      [False, True, True, False]
    """
    w = jnp.asarray(w)
    check_n_of_m(n, m)
    n, m = operator.index(n), operator.index(m)
    axes = _group_axes(w, m, axis)
    values, to_keys = _scored(lax.stop_gradient(w), score)
    return _keep_highest(values, to_keys, n, m, axes)


@partial(jax.jit, static_argnames=("to_keys", "n", "m", "axes"), inline=True)
def _keep_highest(
    values: jax.Array, to_keys: ToKeys, n: int, m: int, axes: tuple[int, ...]
) -> jax.Array:
    """The mask of values of checked shape, as one computation also outside `jax.jit`."""
    groups, ungroup, group_axis = _grouped(values, m, axes)
    keep = _keep_by_rank if m <= 4 else _keep_by_network if m <= 32 else keep_highest
    return ungroup(keep(groups, to_keys, n, group_axis))


def _keep_by_rank(groups: jax.Array, to_keys: ToKeys, n: int, axis: int) -> jax.Array:
    """Keeps whoever is beaten by fewer than n of its group; one pass, nothing stored."""
    mine, position = to_keys(groups), _constant_index(groups, axis)
    beaten_by = jnp.zeros_like(mine)
    for j, other in enumerate(slices(groups, axis)):
        # Keys are integers, so `>` with one added is `>=`: that is how a lower index wins a tie.
        beats_me = to_keys(other) + (j < position).astype(mine.dtype) > mine
        beaten_by += beats_me.astype(mine.dtype)
    return beaten_by < n


def _constant_index(groups: jax.Array, axis: int) -> jax.Array:
    """`index`, a constant but for CPUs.

    Of an iota, XLA for GPUs makes several kernels that run before the mask's own; with a constant,
    XLA for CPUs is several times slower along the last axis.
    """
    shape = [groups.shape[i] if i == axis else 1 for i in range(groups.ndim)]
    constant = np.arange(groups.shape[axis], dtype=np.int32).reshape(shape)
    position: jax.Array = lax.platform_dependent(
        cpu=lambda: index(groups, axis), default=lambda: jnp.asarray(constant)
    )
    return position


def _keep_by_network(groups: jax.Array, to_keys: ToKeys, n: int, axis: int) -> jax.Array:
    """Keeps what a sorting network puts among the first n; the answer is one bit a weight."""
    keys = [to_keys(part) for part in slices(groups, axis)]
    threshold = _sorted_descending(keys)[n - 1]
    ties_left = n - sum((key > threshold).astype(jnp.int32) for key in keys)
    kept_bits = jnp.zeros_like(threshold, dtype=jnp.uint32)
    for j, key in enumerate(keys):
        tied = key == threshold
        kept = (key > threshold) | (tied & (ties_left > 0))
        ties_left -= tied.astype(jnp.int32)
        kept_bits |= kept.astype(jnp.uint32) << j
    return (_computed_once(kept_bits, axis) >> index(groups, axis).astype(jnp.uint32)) & 1 == 1


def _sorted_descending(values: Sequence[jax.Array]) -> list[jax.Array]:
    """Sorts element by element across arrays; what the caller leaves unused is never computed."""
    wires = list(values)
    for i, j in _merge_exchange(len(wires)):
        wires[i], wires[j] = jnp.maximum(wires[i], wires[j]), jnp.minimum(wires[i], wires[j])
    return wires


def _merge_exchange(size: int) -> Iterator[tuple[int, int]]:
    """Comparator pairs of Batcher's merge exchange (Knuth, TAOCP 3, 5.2.2, algorithm M)."""
    top = 1 << max(size - 1, 0).bit_length() >> 1
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            yield from ((i, i + d) for i in range(size - d) if i & p == r)
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2


def _computed_once(x: jax.Array, axis: int) -> jax.Array:
    """Has XLA store `x` (size 1 along `axis`) instead of recomputing it for every reader.

    XLA's CPU compiler drops optimization barriers before it fuses, and fuses cheap operations
    into everyone who reads them, but it never does that to a reduction: so this is a maximum over
    `x` and a zero.
    """
    shape = [1] * x.ndim
    shape[axis] = 2
    is_x = lax.broadcasted_iota(jnp.int32, shape, axis) == 0
    return jnp.max(jnp.where(is_x, x, 0), axis=axis, keepdims=True)


def _grouped(
    x: jax.Array, m: int, axes: tuple[int, ...]
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array], int]:
    """Takes `axes` together and cuts them by m; returns the groups, the way back, their axis."""
    first = min(axes)
    rest = [a for a in range(x.ndim) if a not in axes]
    order = [*rest[:first], *axes, *rest[first:]]
    moved = x if order == sorted(order) else x.transpose(order)
    before, after = moved.shape[:first], moved.shape[first + len(axes) :]
    size = math.prod(moved.shape[first : first + len(axes)])
    merged = (*before, size, *after)

    def ungroup(groups: jax.Array) -> jax.Array:
        result = groups.reshape(merged).reshape(moved.shape)
        return result if order == sorted(order) else result.transpose(np.argsort(order))

    return moved.reshape(merged).reshape(*before, size // m, m, *after), ungroup, first + 1


def _scored(w: jax.Array, score: Score) -> tuple[jax.Array, ToKeys]:
    """Values, and the function that turns them or slices of them into sortable integers."""
    check_real_floating("weights", w.dtype)
    if score is magnitude:  # Its keys are cheaper straight from the weights.
        return w, magnitude_keys
    scores = score_weights(w, score)
    check_real_floating("scores", scores.dtype)
    return scores, signed_keys


def _group_axes(w: jax.Array, m: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    """The fewest axes, non-negative and in the order given, that m cuts into whole groups."""
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if not given or not all(hasattr(a, "__index__") and not isinstance(a, bool) for a in given):
        raise TypeError(f"axis must be an integer or a sequence of integers, got {axis!r}")
    if any(not -w.ndim <= a < w.ndim for a in given):
        raise ValueError(f"axis {axis} is out of range for weights of shape {w.shape}")
    axes = tuple(operator.index(a) % w.ndim for a in given)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis {axis} repeats an axis of weights of shape {w.shape}")
    sizes = [w.shape[a] for a in axes]
    if math.prod(sizes) % m:
        raise ValueError(
            f"groups of {m} do not fit: weights of shape {w.shape} have {math.prod(sizes)} along "
            f"axis {axis}, which {m} does not divide; choose another m, or keep this layer dense"
        )
    # Where m divides the last axes alone, no group reaches across the ones before them.
    fewest = next(i for i in reversed(range(len(axes))) if math.prod(sizes[i:]) % m == 0)
    check_shards(w, m, axes[fewest:], f"groups of {m} along axis {axis}")
    return axes[fewest:]
