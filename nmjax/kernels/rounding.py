"""Inputs of products rounded to int8, one scale for each row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_LARGEST = 127


def round_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds each row to 255 steps, symmetric around zero; the largest magnitude is exact.

    Args:
      x: (batch, ...), floating. A row is everything behind the first axis.

    Returns:
      The integers, int8 of x's shape, and float32 steps (batch, 1 ...), such that their product is
      x to half a step. Steps are NaN for rows that have a NaN or an infinity.

    >>> integers, steps = round_rows(jnp.array([[0.5, -12.7, 3.04], [0.0, 0.0, 0.0]]))
    >>> integers.tolist(), steps.round(3).ravel().tolist()
    ([[5, -127, 30], [0, 0, 0]], [0.10000000149011612, 1.0])
    """
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=tuple(range(1, x.ndim)), keepdims=True, initial=0)
    # A row of zeros keeps step 1, since 0 / 0 would be NaN.
    finite = jnp.isfinite(largest)
    steps = jnp.where(finite & (largest > 0), largest / _LARGEST, 1)
    integers = jnp.clip(jnp.round(jnp.where(finite, wide, 0) / steps), -_LARGEST, _LARGEST)
    return integers.astype(jnp.int8), jnp.where(finite, steps, jnp.nan)
