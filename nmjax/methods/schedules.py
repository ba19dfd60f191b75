"""Ramps: how much of the final sparsity holds at a step, from 0 to 1.

Each takes `begin` and `end` and gives a function of the step, which may be traced. Steps are
counted in whatever unit the caller counts in; nmjax's sparsifiers count optimizer steps. With x
running from 0 at `begin` to 1 at `end`, and held there outside:

| ramp | fraction |
|---|---|
| `cubic_ramp` | x^3: slow at first, fast at the end |
| `linear_ramp` | x |
| `cosine_ramp` | 1 - cos(pi x / 2) |
| `exponential_ramp` | (1 - exp(-rate (step - begin))) / (1 - exp(-rate (end - begin))) |

The cubic one is not Zhu and Gupta's 1 - (1 - x)^3, which is fast at first.

Source: `models/conv_type/base_conv.py` of JingyangXiang/SUBP (Xiang et al., NeurIPS 2023), where
`begin` is epoch 10, `end` epoch 180, and `rate` 0.05 an epoch.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Ramp = Callable[[ArrayLike], jax.Array]


def cubic_ramp(begin: float, end: float) -> Ramp:
    """The cube of the part of the way that is done.

    Args:
      begin: step up to which the fraction is 0.
      end: step from which on it is exactly 1.

    Returns:
      step -> float32 scalar in [0, 1].

    Raises:
      ValueError: not 0 <= begin < end.

    >>> ramp = cubic_ramp(10, 20)
    >>> [float(ramp(step)) for step in (5, 10, 15, 20, 25)]
    [0.0, 0.0, 0.125, 1.0, 1.0]
    """
    return _shaped(lambda x: x**3, begin, end)


def linear_ramp(begin: float, end: float) -> Ramp:
    """The part of the way that is done. Arguments and errors as `cubic_ramp`."""
    return _shaped(lambda x: x, begin, end)


def cosine_ramp(begin: float, end: float) -> Ramp:
    """A quarter of a cosine, slow at first. Arguments and errors as `cubic_ramp`."""
    return _shaped(lambda x: 1 - jnp.cos(jnp.pi * x / 2), begin, end)


def exponential_ramp(begin: float, end: float, *, rate: float) -> Ramp:
    """An exponential approach, fast at first.

    Args:
      begin: step up to which the fraction is 0.
      end: step from which on it is exactly 1.
      rate: of the approach for each step, positive; 0.05 divided by the steps in an epoch for the
        paper's code.

    Returns:
      step -> float32 scalar in [0, 1].

    Raises:
      ValueError: not 0 <= begin < end, or `rate` is not positive.
    """
    if not rate > 0:
        raise ValueError(f"the rate of an exponential ramp is positive, got {rate}")
    whole = rate * (end - begin)
    return _shaped(lambda x: jnp.expm1(-whole * x) / jnp.expm1(-whole), begin, end)


def _shaped(shape: Callable[[jax.Array], jax.Array], begin: float, end: float) -> Ramp:
    if not 0 <= begin < end:
        raise ValueError(f"a ramp runs from begin to end with 0 <= begin < end, got {begin}, {end}")

    def ramp(step: ArrayLike) -> jax.Array:
        done = (jnp.asarray(step, jnp.float32) - begin) / (end - begin)
        inside = jnp.clip(shape(jnp.clip(done, 0, 1)), 0, 1)
        # What follows counts blocks by it: rounding may not leave one over at the end.
        return jnp.where(done >= 1, 1.0, jnp.where(done <= 0, 0.0, inside))

    return ramp
