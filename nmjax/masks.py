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

from nmjax.patterns import check_n_of_m
from nmjax.scores import Score, magnitude

ToKeys = Callable[[jax.Array], jax.Array]


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
    keep = _keep_by_rank if m <= 4 else _keep_by_network if m <= 32 else _keep_by_bisection
    return ungroup(keep(groups, to_keys, n, group_axis))


def _keep_by_rank(groups: jax.Array, to_keys: ToKeys, n: int, axis: int) -> jax.Array:
    """Keeps whoever is beaten by fewer than n of its group; one pass, nothing stored."""
    mine, index = to_keys(groups), _index(groups, axis)
    beaten_by = jnp.zeros_like(mine)
    for j, other in enumerate(_slices(groups, axis)):
        # Keys are integers, so `>` with one added is `>=`: that is how a lower index wins a tie.
        beats_me = to_keys(other) + (j < index).astype(mine.dtype) > mine
        beaten_by += beats_me.astype(mine.dtype)
    return beaten_by < n


def _keep_by_network(groups: jax.Array, to_keys: ToKeys, n: int, axis: int) -> jax.Array:
    """Keeps what a sorting network puts among the first n; the answer is one bit a weight."""
    keys = [to_keys(part) for part in _slices(groups, axis)]
    threshold = _sorted_descending(keys)[n - 1]
    ties_left = n - sum((key > threshold).astype(jnp.int32) for key in keys)
    kept_bits = jnp.zeros_like(threshold, dtype=jnp.uint32)
    for j, key in enumerate(keys):
        tied = key == threshold
        kept = (key > threshold) | (tied & (ties_left > 0))
        ties_left -= tied.astype(jnp.int32)
        kept_bits |= kept.astype(jnp.uint32) << j
    return (_computed_once(kept_bits, axis) >> _index(groups, axis).astype(jnp.uint32)) & 1 == 1


def _keep_by_bisection(groups: jax.Array, to_keys: ToKeys, n: int, axis: int) -> jax.Array:
    """Keeps all keys above the n-th highest, and the first so many of those equal to it."""

    def count(flags: jax.Array) -> jax.Array:
        return jnp.sum(flags, axis=axis, keepdims=True, dtype=jnp.int32)

    index = _index(groups, axis)
    first = to_keys(next(_slices(groups, axis)))
    lowest = lax.full_like(first, jnp.iinfo(first.dtype).min)
    threshold = _largest(
        lambda t: count(to_keys(groups) >= t) >= n, lowest, bits=8 * first.dtype.itemsize
    )
    ties_kept = n - count(to_keys(groups) > threshold)
    end = _largest(
        lambda end: count((to_keys(groups) == threshold) & (index < end)) <= ties_kept,
        lax.full_like(first, 0, dtype=jnp.int32),
        bits=groups.shape[axis].bit_length(),
    )
    keys = to_keys(groups)
    return (keys > threshold) | ((keys == threshold) & (index < end))


def _largest(accepts: Callable[[jax.Array], jax.Array], start: jax.Array, bits: int) -> jax.Array:
    """The largest integers in start + [0, 2^bits) that `accepts`, which is monotone, accepts."""

    def try_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found + (jnp.ones((), found.dtype) << jnp.asarray(bits - 1 - i, found.dtype))
        return jnp.where(accepts(candidate), candidate, found)

    return lax.fori_loop(0, bits, try_bit, start)


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


def _index(groups: jax.Array, axis: int) -> jax.Array:
    """Position in the group, of a shape that broadcasts against `groups`."""
    shape = [1] * groups.ndim
    shape[axis] = groups.shape[axis]
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _slices(groups: jax.Array, axis: int) -> Iterator[jax.Array]:
    return (lax.slice_in_dim(groups, j, j + 1, axis=axis) for j in range(groups.shape[axis]))


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
    _check_real_floating("weights", w.dtype)
    if score is magnitude:  # Its keys are cheaper straight from the weights.
        return w, _magnitude_keys
    scores = score(w)
    if scores.shape != w.shape:
        raise ValueError(
            f"score must give one importance for each weight: weights have shape {w.shape}, "
            f"scores have shape {scores.shape}"
        )
    _check_real_floating("scores", scores.dtype)
    return scores, _signed_keys


def _magnitude_keys(w: jax.Array) -> jax.Array:
    """Integers in the order of |w|; NaN is one above infinity."""
    bits, infinity = _bits(w)
    return jnp.minimum(bits & jnp.iinfo(bits.dtype).max, infinity + 1)


def _signed_keys(scores: jax.Array) -> jax.Array:
    """Integers in the order of the scores; NaN is one above infinity, -0.0 equals 0.0."""
    bits, infinity = _bits(scores)
    absolute = bits & jnp.iinfo(bits.dtype).max
    # The sign bit, not `scores < 0`: denormals count as zero where the CPU flushes them.
    signed = jnp.where(bits < 0, -absolute, absolute)
    return jnp.where(absolute > infinity, infinity + 1, signed)


def _bits(x: jax.Array) -> tuple[jax.Array, np.ndarray]:
    """The bits of floating point numbers, and of infinity, as integers of 32 bits or more."""
    if x.dtype.itemsize < 4:
        x = x.astype(jnp.float32)  # Exact, and vectorised better than narrow integers.
    dtype = np.dtype(f"int{8 * x.dtype.itemsize}")
    return lax.bitcast_convert_type(x, dtype), np.array(np.inf, x.dtype).view(dtype)


def _check_real_floating(what: str, dtype: np.dtype) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{what} must be real floating point, got dtype {dtype}")


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
    _check_shards(w, m, axes[fewest:], axis)
    return axes[fewest:]


def _check_shards(w: jax.Array, m: int, axes: tuple[int, ...], axis: int | Sequence[int]) -> None:
    """Raises if explicit sharding cuts a group; automatic sharding is the compiler's business."""
    sharding = jax.typeof(w).sharding
    shards = [
        math.prod(sharding.mesh.shape[name] for name in _names(sharding.spec[a])) for a in axes
    ]
    size = math.prod(w.shape[a] for a in axes)
    if any(count > 1 for count in shards[1:]) or size // shards[0] % m:
        raise ValueError(
            f"groups of {m} along axis {axis} of {jax.typeof(w)} reach across shards; shard other "
            f"axes, or let every shard hold a multiple of {m}, or use jax.reshard first"
        )


def _names(partition: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes that one entry of a PartitionSpec names."""
    return (partition,) if isinstance(partition, str) else tuple(partition or ())
