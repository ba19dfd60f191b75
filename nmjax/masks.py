"""Which weights stay: importance scores and an N:M pattern give a boolean mask.

A mask is True where a weight is kept. Every function here is pure, takes tracers, and is not
differentiated: gradient rules live in `nmjax.straight_through`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.patterns import check_n_of_m
from nmjax.scores import Score, magnitude


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
      Boolean array of `w`'s shape and sharding, True = kept.

    Raises:
      TypeError: `w` or its score is not real floating point; `n`, `m` or `axis` not integer.
      ValueError: not 1 <= n <= m; `axis` out of range or repeated; `m` does not divide the size
        of `axis`; the score has another shape than `w`.

    Example:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([0.1, -3.0, 2.0, 0.5])
      >>> jnp.where(nm_mask(w, 2, 4, axis=0), w, 0)
      Array([ 0., -3.,  2.,  0.], dtype=float32)
    """
    w = jnp.asarray(w)
    check_n_of_m(n, m)
    n, m = operator.index(n), operator.index(m)
    axes = _checked_axes(w, m, axis)
    keys = _sort_keys(_checked_score(lax.stop_gradient(w), score))
    return _map_groups(lambda groups, group_axis: _top_n(groups, n, group_axis), keys, m, axes)


def _top_n(keys: jax.Array, n: int, axis: int) -> jax.Array:
    """True for the n largest keys along `axis`; of equal ones the lower index first."""
    keys = jnp.moveaxis(keys, axis, -1)
    mine, other = keys[..., :, None], keys[..., None, :]
    index = np.arange(keys.shape[-1])
    beats = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return jnp.moveaxis(jnp.sum(beats, axis=-1) < n, -1, axis)


def _sort_keys(scores: jax.Array) -> jax.Array:
    """Signed integers in the order of the scores: all NaNs equal and highest, -0.0 equals 0.0."""
    if scores.dtype.itemsize < 4:
        scores = scores.astype(jnp.float32)
    int_dtype = jnp.int64 if scores.dtype == jnp.float64 else jnp.int32
    bits = lax.bitcast_convert_type(scores, int_dtype)
    absolute = bits & jnp.iinfo(int_dtype).max
    infinity = np.array(np.inf, scores.dtype).view(int_dtype)
    signed = jnp.where(bits < 0, -absolute, absolute)
    return jnp.where(absolute > infinity, jnp.iinfo(int_dtype).max, signed)


def _map_groups(
    function: Callable[[jax.Array, int], jax.Array], x: jax.Array, m: int, axes: tuple[int, ...]
) -> jax.Array:
    """Applies `function(groups, group_axis)` to `x` with `axes` taken together and cut by m."""
    first = min(axes)
    others = [i for i in range(x.ndim) if i not in axes]
    order = [*others[:first], *axes, *others[first:]]
    moved = x if order == sorted(order) else x.transpose(order)
    start, stop = first, first + len(axes)
    size = int(np.prod(moved.shape[start:stop]))
    groups = moved.reshape(*moved.shape[:start], size // m, m, *moved.shape[stop:])
    result = function(groups, start + 1).reshape(moved.shape)
    return result if order == sorted(order) else result.transpose(np.argsort(order))


def _checked_axes(w: jax.Array, m: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if not given or any(
        isinstance(a, bool | np.bool_) or not hasattr(a, "__index__") for a in given
    ):
        raise TypeError(f"axis must be an integer or a sequence of integers, got {axis!r}")
    shape = tuple(w.shape)
    if any(not -w.ndim <= a < w.ndim for a in given):
        raise ValueError(f"axis {axis} is out of range for weights of shape {shape}")
    axes = tuple(operator.index(a) % w.ndim for a in given)
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis {axis} names an axis of weights of shape {shape} twice")
    size = int(np.prod([shape[a] for a in axes]))
    if size % m:
        raise ValueError(
            f"groups of {m} do not fit: axis {axis} of weights of shape {shape} has size {size}, "
            f"which {m} does not divide; choose an m that does, or keep this layer dense"
        )
    return axes


def _checked_score(w: jax.Array, score: Score) -> jax.Array:
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"weights must be real floating point, got dtype {w.dtype}")
    scores = score(w)
    if scores.shape != w.shape:
        raise ValueError(
            f"score must return one importance per weight: weights of shape {tuple(w.shape)}, "
            f"scores of shape {tuple(scores.shape)}"
        )
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"scores must be real floating point, got dtype {scores.dtype}")
    return scores
