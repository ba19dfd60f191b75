"""MVUE: unbiased 2:4 gradients with the least variance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from nmjax.masks.nm import nm_mask
from nmjax.masks.ranking import check_real_floating

if TYPE_CHECKING:
    import chex
    from jaxtyping import Array, Float


def mvue_24(
    x: Float[chex.Array, "*shape"],
    key: chex.PRNGKey,
    axis: int = -2,
    *,
    draw: Literal["optimal", "successive"] = "optimal",
) -> Float[Array, "*shape"]:
    """Keeps two of every four entries at random, scaled so that the expectation is the input.

    An entry that is kept with probability p becomes `x / p`. Its second moment is `x^2 / p`, so the
    variance of the group is least for

        p_i = min(1, c |x_i|),   sum of p = 2

    For four entries that is `2 |x_i| / S`, S the sum of all magnitudes, as long as no entry
    exceeds half of it. One that does is always kept, and one of the others is drawn in proportion
    to its magnitude. No unbiased estimator with two entries per group varies less.

    The released code of Hu et al. draws two entries one after the other, in proportion to their
    magnitudes a, and divides by the probability that this keeps them:

        p_i = a_i / S + a_i sum_(j != i) k_j,   k_j = a_j / (S (S - a_j)),   a = |x| + 1.19e-7

    That is unbiased too, with more variance: `draw="successive"`.

    Args:
      x: gradients, real floating dtype.
      key: a fresh random key for each call.
      axis: axis of the groups; 4 divides its size. In `x.T @ g`, with g (tokens, outputs), it is
        that of the tokens, -2.
      draw: `"optimal"`, or `"successive"` as in the released code.

    Returns:
      Array of `x`'s shape and dtype with at most two nonzero entries in each group, computed in
      float32. In a group whose sum is not finite, the two largest entries stay as they are, so
      that NaN stays visible.

    Raises:
      TypeError: `x` is not real floating.
      ValueError: 4 does not divide the size of the axis; `draw` is unknown.

    Source: Chmiel et al., "Minimum Variance Unbiased N:M Sparsity for the Neural Gradients", ICLR
    2023; the successive draw from `sparse/utils.py` of the 2by4-pretrain repository (Hu et al.,
    ICML 2024). The optimal draw here takes one random number per group (systematic sampling).

    >>> x = jnp.array([[8.0], [1.0], [2.0], [1.0]])
    >>> draws = [mvue_24(x, jax.random.key(i)).ravel().tolist() for i in range(3)]
    >>> {draw[0] for draw in draws}, {sum(draw[1:]) for draw in draws}
    ({8.0}, {4.0})
    """
    check_real_floating("gradients", x.dtype)
    if draw not in ("optimal", "successive"):
        raise ValueError(f'draw must be "optimal" or "successive", got {draw!r}')
    if not -x.ndim <= axis < x.ndim or x.shape[axis] % 4:
        raise ValueError(
            f"mvue_24 draws from groups of 4, which do not fit axis {axis} of shape {x.shape}"
        )
    moved = jnp.moveaxis(x, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], moved.shape[-1] // 4, 4)
    drawn = (_optimal if draw == "optimal" else _successive)(groups.astype(jnp.float32), key)
    finite = jnp.isfinite(jnp.sum(jnp.abs(groups.astype(jnp.float32)), axis=-1, keepdims=True))
    largest = jnp.where(nm_mask(groups, 2, 4, -1), groups, 0)
    kept = jnp.where(finite, drawn.astype(x.dtype), largest)
    return jnp.moveaxis(kept.reshape(moved.shape), -1, axis)


def _optimal(x: Float[Array, "*groups 4"], key: chex.PRNGKey) -> Float[Array, "*groups 4"]:
    size = jnp.abs(x)
    total = jnp.sum(size, axis=-1, keepdims=True)
    # At most one entry exceeds half of the sum.
    above = size > total / 2
    rest = jnp.sum(jnp.where(above, 0, size), axis=-1, keepdims=True)
    alone = jnp.any(above, axis=-1, keepdims=True)
    # An entry is worth |x| / p once it is drawn, which does not depend on the entry.
    worth = jnp.where(above, size, jnp.where(alone, rest, total / 2))
    p = size / jnp.where(worth > 0, worth, 1)
    # Lay the probabilities end to end on [0, 2]. The entries under u and 1 + u are kept.
    ends = jnp.cumsum(p, axis=-1)
    # Rounding must not move the last end, or one entry could get lost.
    ends = jnp.where(jnp.arange(4) == 3, 2, jnp.minimum(ends, 2))
    marks = jnp.ceil(ends - jax.random.uniform(key, total.shape))
    before = jnp.pad(marks[..., :-1], [(0, 0)] * (x.ndim - 1) + [(1, 0)])
    return jnp.where(marks > before, jnp.sign(x) * worth, 0)


def _successive(x: Float[Array, "*groups 4"], key: chex.PRNGKey) -> Float[Array, "*groups 4"]:
    a = jnp.abs(x) + 1.19e-7
    total = jnp.sum(a, axis=-1, keepdims=True)
    p = a / total + a * _sum_of_others(a / (total * _sum_of_others(a)))
    # The first two of four exponential clocks with rates a ring like two draws one after the other.
    waited = jax.random.exponential(key, x.shape) / a
    return jnp.where(nm_mask(-waited, 2, 4, -1, score=lambda w: w), x / p, 0)


def _sum_of_others(x: Float[Array, "*groups 4"]) -> Float[Array, "*groups 4"]:
    # Not the sum minus the entry: next to a large entry, the small ones would be lost.
    return jnp.sum(jnp.where(jnp.eye(4, dtype=bool), 0, x[..., None, :]), axis=-1)
