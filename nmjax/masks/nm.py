"""Masks of N:M patterns: the n highest scores of every m consecutive weights are kept.

A mask is True where a weight is kept. It is a pure function of the weights, works on tracers, and
is not differentiated; the gradient rules are in `nmjax.ste`.

Three algorithms give the same mask, and the group size decides which one runs:

- m <= 4: count how many members of the group beat each weight. One pass; it stores only the
  mask.
- m <= 32: a sorting network over the members of a group finds the n-th highest. It stores one bit
  per member, in 4 bytes per group; on GPUs, in one bit per weight. (For m above 8, XLA also widens
  narrow weights into a float32 copy on CPUs, which have no 16-bit slices.)
- any m: bisection for the n-th highest score (`nmjax.masks.ranking.keep_highest`). About 40 passes
  for any m, over one stored copy of the scores.

All compare scores as integers (`nmjax.masks.ranking`), and none sorts, gathers, or rolls an array.
A gather or a roll along a sharded axis would communicate between devices.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.masks.arguments import check_n_of_m, check_stride, group_name
from nmjax.masks.network import kept_members, kept_of_distinct, nth_highest
from nmjax.masks.platforms import keep_primitive
from nmjax.masks.ranking import (
    ToKeys,
    check_real_floating,
    distinct_magnitudes,
    index,
    keep_highest,
    magnitude_keys,
    signed_keys,
    slices,
)
from nmjax.masks.scores import Score, as_array, magnitude, score_weights
from nmjax.masks.shards import check_shards
from nmjax.ste import apply_mask

if TYPE_CHECKING:
    import chex
    from jax.typing import ArrayLike
    from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32


def nm_mask(
    w: Float[ArrayLike, "*shape"],
    n: SupportsIndex,
    m: SupportsIndex,
    axis: SupportsIndex | Sequence[SupportsIndex] = -2,
    *,
    score: Score = magnitude,
    stride: SupportsIndex = 1,
) -> Bool[Array, "*shape"]:
    """Keeps exactly the n highest scores of every m consecutive weights along `axis`.

    With a stride s, the members of a group lie s apart: each run of m * s consecutive weights
    holds s groups, and group r of a run has its members at r, r + s, ..., r + (m - 1) * s.

    In a tie, the weight at the lower index is kept. Every NaN counts as the highest score, so
    that it stays visible; -0.0 equals 0.0.

    Args:
      w: weights, real floating dtype.
      n: how many of each group are kept, 1 <= n <= m.
      m: group size; `m * stride` divides the size of `axis`.
      axis: axis along which groups extend. Several axes are flattened in the order given, and the
        last varies fastest: `(-3, -2)` for the (heads, head_dim) of an attention output kernel,
        `(-2, -4, -3)` for the (I, H, W) of a convolution kernel stored as HWIO.
      score: function from the weights to scores of the same shape, real floating dtype.
      stride: distance between the members of a group, at least 1.

    Returns:
      Boolean array of `w`'s shape, True = kept. If every shard of `w` holds whole runs of
      `m * stride` weights, the mask is sharded like `w` and computed without communication.

    Raises:
      TypeError: `w` or its scores are not real floating point; `n`, `m`, `stride`, or `axis` is
        not an integer.
      ValueError: not 1 <= n <= m; `stride` < 1; `axis` is out of range or repeated; `m * stride`
        does not divide the size of `axis`; the scores do not have `w`'s shape; a shard along an
        explicit mesh axis holds part of a run.

    Example:
      >>> w = jnp.array([0.1, -3.0, 2.0, 0.5])
      >>> nm_mask(w, 2, 4, axis=0).tolist()
      [False, True, True, False]
      >>> nm_mask(w, 1, 2, axis=0, stride=2).tolist()  # 0.1 against 2.0, and -3.0 against 0.5
      [False, True, True, False]
    """
    return _keep(lax.stop_gradient(as_array(w)), n, m, axis, score, stride, as_mask=True)


def nm_prune(
    w: Float[ArrayLike, "*shape"],
    n: SupportsIndex,
    m: SupportsIndex,
    axis: SupportsIndex | Sequence[SupportsIndex] = -2,
    *,
    score: Score = magnitude,
    stride: SupportsIndex = 1,
    dtype: np.dtype | None = None,
) -> Float[Array, "*shape"]:
    """`w` where `nm_mask` is True, else zero, in a single pass over `w`.

    Kept weights have the gradient 1, the others 0. With `dtype`, the mask is that of `w`, and what
    is kept is rounded to this dtype in the same pass.
    """
    if score is magnitude:
        return _keep(as_array(w), n, m, axis, score, stride, as_mask=False, dtype=dtype)
    kept = apply_mask(as_array(w), nm_mask(w, n, m, axis, score=score, stride=stride))
    return kept if dtype is None else kept.astype(dtype)


def _keep(
    w: Float[Array, "*shape"],
    n: SupportsIndex,
    m: SupportsIndex,
    axis: SupportsIndex | Sequence[SupportsIndex],
    score: Score,
    stride: SupportsIndex,
    *,
    as_mask: bool,
    dtype: np.dtype | None = None,
) -> jax.Array:
    """The mask, or the values ranked with zeros where it is False."""
    check_n_of_m(n, m)  # type: ignore[arg-type]
    check_stride(stride)
    n, m, stride = operator.index(n), operator.index(m), operator.index(stride)
    axes = tuple(a - w.ndim for a in _group_axes(w, m, stride, axis))
    if w.shape[axes[-1]] % (m * stride) == 0:
        axes = axes[-1:]  # Its runs are those of all axes, and nothing has to move.
    values, to_keys = _scored(w, score)
    if as_mask:  # Scores may depend on more than the weights; no gradient passes to that, either.
        values = lax.stop_gradient(values)
    out = np.dtype(bool) if as_mask else values.dtype if dtype is None else np.dtype(dtype)
    rule = {"to_keys": to_keys, "n": n, "m": m, "stride": stride, "axes": axes}
    kept: jax.Array = _keep_p.bind(values, **rule, out=out)
    return kept


def _keep_by_xla(
    values: Float[Array, "*shape"],
    *,
    to_keys: ToKeys,
    n: int,
    m: int,
    stride: int,
    axes: tuple[int, ...],
    out: np.dtype,
) -> Bool[Array, "*shape"] | Float[Array, "*shape"]:
    """What the primitive computes on platforms without a kernel of their own."""
    mask = _keep_highest(values, to_keys, n, m, stride, tuple(a % values.ndim for a in axes))
    return mask if out == np.bool_ else apply_mask(values, mask).astype(out)


def _keep_by_tpu(
    values: Float[Array, "*shape"],
    *,
    to_keys: ToKeys,
    n: int,
    m: int,
    stride: int,
    axes: tuple[int, ...],
    out: np.dtype,
    interpret: bool = False,
) -> Bool[Array, "*shape"] | Float[Array, "*shape"]:
    """The same, by the kernel for TPUs."""
    from nmjax.masks import tpu  # Here, since it loads Pallas.

    del stride

    def choose(members: Sequence[jax.Array]) -> list[jax.Array]:
        if values.dtype == jnp.bfloat16 and to_keys is magnitude_keys:
            return kept_of_distinct(distinct_magnitudes(members), n)
        return kept_members([to_keys(member) for member in members], n)

    # The kernel rounds float32 to bfloat16 before it writes; XLA casts to everything else.
    rounded = out == jnp.bfloat16 and values.dtype == jnp.float32
    written = out if out == np.bool_ or rounded else values.dtype
    return tpu.keep_in_groups(values, choose, m, axes, written, interpret=interpret).astype(out)


def _tpu_takes(
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    m: int,
    stride: int,
    axes: tuple[int, ...],
    **rule: object,
) -> bool:
    from nmjax.masks import tpu

    del rule
    return stride == 1 and tpu.misfit(shape, dtype, m, axes) is None


_keep_p = keep_primitive("nm_keep", _keep_by_xla, _keep_by_tpu, _tpu_takes)


def _keep_highest(
    values: Float[Array, "*shape"],
    to_keys: ToKeys,
    n: int,
    m: int,
    stride: int,
    axes: tuple[int, ...],
) -> Bool[Array, "*shape"]:
    """The mask of checked values."""
    # Counting compares all m^2 pairs of a group, so it pays for small m only. The network keeps one
    # bit per member in a 32-bit integer, so it ends at 32.
    groups, ungroup, group_axis = _grouped(values, m, stride, axes)
    keep = _keep_by_rank if m <= 4 else _keep_by_network if m <= 32 else keep_highest
    return ungroup(keep(groups, to_keys, n, group_axis))


def _keep_by_rank(
    groups: Float[Array, "*groups"], to_keys: ToKeys, n: int, axis: int
) -> Bool[Array, "*groups"]:
    """Keeps each weight that fewer than n members of its group beat."""
    mine, position = to_keys(groups), _constant_index(groups, axis)
    beaten_by = jnp.zeros_like(mine)
    for j, other in enumerate(slices(groups, axis)):
        # Ties go to the lower index: a member before me also beats me with an equal key. Keys are
        # integers, so adding one turns `>` into `>=`. The largest key, that of NaN, has room for
        # it.
        beats_me = to_keys(other) + (j < position).astype(mine.dtype) > mine
        beaten_by += beats_me.astype(mine.dtype)
    return beaten_by < n


def _constant_index(groups: Shaped[Array, "*shape"], axis: int) -> Int32[Array, "*positions"]:
    """Like `index`, but as a constant on every platform except CPUs."""
    # XLA for GPUs turns an iota into several kernels that run before the mask's own. XLA for CPUs
    # is several times slower with a constant along the last axis.
    shape = [groups.shape[i] if i == axis else 1 for i in range(groups.ndim)]
    constant = np.arange(groups.shape[axis], dtype=np.int32).reshape(shape)
    position: jax.Array = lax.platform_dependent(
        cpu=lambda: index(groups, axis), default=lambda: jnp.asarray(constant)
    )
    return position


def _keep_by_network(
    groups: Float[Array, "*groups"], to_keys: ToKeys, n: int, axis: int
) -> Bool[Array, "*groups"]:
    """Keeps what a sorting network ranks among the first n of each group."""
    keys = [to_keys(part) for part in slices(groups, axis)]
    threshold = nth_highest(keys, n)
    # One integer per group, with a bit for each member, is all that gets stored. Every weight reads
    # its answer back with a shift.
    above = tied = jnp.zeros_like(threshold, dtype=jnp.uint32)
    for j, key in enumerate(keys):
        above |= (key > threshold).astype(jnp.uint32) << j
        tied |= (key == threshold).astype(jnp.uint32) << j
    # Keys above the threshold all stay. The places that are left go to the keys equal to it, the
    # lowest index first: `x & (x - 1)` clears the lowest bit of x.
    ties_left = n - lax.population_count(above).astype(jnp.int32)
    dropped = tied
    for i in range(n):
        dropped = jnp.where(i < ties_left, dropped & (dropped - 1), dropped)
    kept_bits = above | (tied ^ dropped)
    stored: jax.Array = lax.platform_dependent(
        kept_bits,
        cuda=partial(_one_bit_per_member, members=len(keys)),
        rocm=partial(_one_bit_per_member, members=len(keys)),
        default=partial(_computed_once, axis=axis),
    )
    return (stored >> index(groups, axis).astype(jnp.uint32)) & 1 == 1


def _one_bit_per_member(x: UInt32[Array, "*shape"], members: int) -> UInt32[Array, "*shape"]:
    """Passes `x` through the narrowest type that has a bit for each member of a group."""
    # XLA for GPUs stores `x` by itself, since its cost model finds m networks too expensive. So the
    # mask is two kernels with a bit per weight between them. Formulations that it fuses into one
    # kernel compute every group once for each of its weights, which takes longer.
    narrow = jnp.uint8 if members <= 8 else jnp.uint16 if members <= 16 else jnp.uint32
    return x.astype(narrow).astype(jnp.uint32)


def _computed_once(x: UInt32[Array, "*shape"], axis: int) -> UInt32[Array, "*shape"]:
    """Makes XLA store `x`, of size 1 along `axis`, instead of recomputing it for every reader."""
    # XLA for CPUs would fuse the whole network into every weight that reads `x`, and so compute it
    # m times per group. It drops optimization barriers before it fuses, but it never duplicates a
    # reduction. So this is a reduction that changes nothing: the maximum of `x` and zero.
    shape = [1] * x.ndim
    shape[axis] = 2
    is_x = lax.broadcasted_iota(jnp.int32, shape, axis) == 0
    return jnp.max(jnp.where(is_x, x, 0), axis=axis, keepdims=True)


def _grouped(
    x: Shaped[Array, "*shape"], m: int, stride: int, axes: tuple[int, ...]
) -> tuple[Shaped[Array, "*groups"], Callable[[jax.Array], jax.Array], int]:
    """Flattens `axes` and cuts them into groups of m whose members lie `stride` apart.

    Returns:
      The groups, a function that undoes the grouping, and the axis of size m.
    """
    # Only `axes` move, to the place of the first of them. For a single axis nothing moves, and the
    # reshape copies nothing.
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

    # Strided groups lie side by side along the axis behind the one of size m.
    cut = (size // (m * stride), m) if stride == 1 else (size // (m * stride), m, stride)
    return moved.reshape(merged).reshape(*before, *cut, *after), ungroup, first + 1


def _scored(w: Float[Array, "*shape"], score: Score) -> tuple[Float[chex.Array, "*shape"], ToKeys]:
    """Values to rank, and the function that turns them into sortable integers."""
    check_real_floating("weights", w.dtype)
    if score is magnitude:  # The bits of the weights give its keys without computing |w|.
        return w, magnitude_keys
    scores = score_weights(w, score)
    check_real_floating("scores", scores.dtype)
    return scores, signed_keys


def _group_axes(
    w: Shaped[Array, "*shape"],
    m: int,
    stride: int,
    axis: SupportsIndex | Sequence[SupportsIndex],
) -> tuple[int, ...]:
    """The last axes given, as few as hold whole groups; non-negative, in the order given."""
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if not given or not all(hasattr(a, "__index__") and not isinstance(a, bool) for a in given):
        raise TypeError(f"axis must be an integer or a sequence of integers, got {axis!r}")
    indices = [operator.index(a) for a in given]
    if any(not -w.ndim <= a < w.ndim for a in indices):
        raise ValueError(f"axis {axis} is out of range for weights of shape {w.shape}")
    axes = tuple(a % w.ndim for a in indices)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis {axis} repeats an axis of weights of shape {w.shape}")
    sizes = [w.shape[a] for a in axes]
    run, what = m * stride, group_name(m, stride)
    if math.prod(sizes) % run:
        raise ValueError(
            f"{what} do not fit: weights of shape {w.shape} have {math.prod(sizes)} along axis "
            f"{axis}, which {run} does not divide; choose another m"
            f"{' or stride' if stride > 1 else ''} or keep this layer dense"
        )
    # If a run divides the product of the last axes, no group extends into the axes before them.
    # Fewer axes mean fewer transpositions, and the axes left out may be sharded in any way.
    fewest = next(i for i in reversed(range(len(axes))) if math.prod(sizes[i:]) % run == 0)
    check_shards(w, run, axes[fewest:], f"{what} along axis {axis}")
    return axes[fewest:]
