"""Ramps: the fraction of the final sparsity at each step, from 0 to 1.

Each ramp takes `begin` and `end` and returns a function of the step, which may be traced. Any unit
of steps works; nmjax's sparsifiers count optimizer steps. With x = (step - begin) / (end - begin),
clipped to [0, 1]:

| ramp | fraction |
|---|---|
| `cubic_ramp` | x^3: slow at first, fast at the end |
| `linear_ramp` | x |
| `cosine_ramp` | 1 - cos(pi x / 2) |
| `exponential_ramp` | (1 - exp(-rate (step - begin))) / (1 - exp(-rate (end - begin))) |

The cubic ramp is not Zhu and Gupta's 1 - (1 - x)^3, which is fast at first.

Source: `models/conv_type/base_conv.py` of JingyangXiang/SUBP (Xiang et al., NeurIPS 2023), where
`begin` is epoch 10, `end` is epoch 180, and `rate` is 0.05 per epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    import chex

Ramp = Callable[["chex.Numeric"], jax.Array]


def cubic_ramp(begin: float, end: float) -> Ramp:
    """Rises as the cube of the time since `begin`: slow at first, fast at the end.

    Args:
      begin: last step at which the fraction is 0.
      end: first step at which the fraction is exactly 1.

    Returns:
      step -> float32 scalar in [0, 1].

    Raises:
      ValueError: unless 0 <= begin < end.

    >>> ramp = cubic_ramp(10, 20)
    >>> [float(ramp(step)) for step in (5, 10, 15, 20, 25)]
    [0.0, 0.0, 0.125, 1.0, 1.0]
    """
    return _ramp(lambda x: x**3, begin, end)


def linear_ramp(begin: float, end: float) -> Ramp:
    """Rises in proportion to the time since `begin`. Arguments and errors as in `cubic_ramp`."""
    return _ramp(lambda x: x, begin, end)


def cosine_ramp(begin: float, end: float) -> Ramp:
    """Rises like a quarter of a cosine, slow at first. Arguments and errors as in `cubic_ramp`."""
    return _ramp(lambda x: 1 - jnp.cos(jnp.pi * x / 2), begin, end)


def exponential_ramp(begin: float, end: float, *, rate: float) -> Ramp:
    """Approaches 1 exponentially, fast at first.

    Args:
      begin: last step at which the fraction is 0.
      end: first step at which the fraction is exactly 1.
      rate: decay rate per step, positive; the paper's code uses 0.05 per epoch.

    Raises:
      ValueError: unless 0 <= begin < end and `rate` > 0.
    """
    if not rate > 0:
        raise ValueError(f"the rate of an exponential ramp must be positive, got {rate}")
    total = rate * (end - begin)
    return _ramp(lambda x: jnp.expm1(-total * x) / jnp.expm1(-total), begin, end)


def _ramp(shape: Callable[[jax.Array], jax.Array], begin: float, end: float) -> Ramp:
    if not 0 <= begin < end:
        raise ValueError(f"a ramp needs 0 <= begin < end, got begin={begin}, end={end}")

    def ramp(step: chex.Numeric) -> jax.Array:
        x = (jnp.asarray(step, jnp.float32) - begin) / (end - begin)
        inside = jnp.clip(shape(jnp.clip(x, 0, 1)), 0, 1)
        # Sparsifiers count blocks with this fraction. If rounding left it below 1 at the end, they
        # would restore a block too many, so the ends are exact.
        return jnp.where(x >= 1, 1.0, jnp.where(x <= 0, 0.0, inside))

    return ramp
