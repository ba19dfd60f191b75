"""Inputs of products rounded to int8, with a step for each row or one for all."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LARGEST = 127  # Of integers that are symmetric around zero: -128 is not used.


def round_by(x: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds inputs (batch, ...) to multiples of one step; otherwise like `round_rows`.

    Inputs beyond 127 steps become 127 steps. Rows with a NaN have steps of NaN.
    """
    wide = x.astype(jnp.float32)
    missing = jnp.isnan(wide)
    integers = jnp.clip(jnp.round(wide / step), -LARGEST, LARGEST)
    integers = jnp.where(missing, 0, integers).astype(jnp.int8)
    undefined = missing.any(axis=tuple(range(1, x.ndim)), keepdims=True)
    return integers, jnp.where(undefined, jnp.nan, step)


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
    steps = jnp.where(finite & (largest > 0), largest / LARGEST, 1)
    integers = jnp.clip(jnp.round(jnp.where(finite, wide, 0) / steps), -LARGEST, LARGEST)
    return integers.astype(jnp.int8), jnp.where(finite, steps, jnp.nan)
