"""How much a weight matters: functions from a weight array to importances of the same shape."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Score = Callable[[jax.Array], jax.Array]


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
