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

import bisect
import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.masks.arguments import check_number

if TYPE_CHECKING:
    import chex
    from jaxtyping import Array, Int32

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
    return _ramp(lambda x: x**3, lambda x: 1 - x**3, begin, end)


def linear_ramp(begin: float, end: float) -> Ramp:
    """Rises in proportion to the time since `begin`. Arguments and errors as in `cubic_ramp`."""
    return _ramp(lambda x: x, lambda x: 1 - x, begin, end)


def cosine_ramp(begin: float, end: float) -> Ramp:
    """Rises like a quarter of a cosine, slow at first. Arguments and errors as in `cubic_ramp`."""
    return _ramp(
        lambda x: 1 - jnp.cos(jnp.pi * x / 2), lambda x: math.cos(math.pi * x / 2), begin, end
    )


def exponential_ramp(begin: float, end: float, *, rate: float) -> Ramp:
    """Approaches 1 exponentially, fast at first.

    Args:
      begin: last step at which the fraction is 0.
      end: first step at which the fraction is exactly 1.
      rate: decay rate per step, positive; the paper's code uses 0.05 per epoch.

    Raises:
      ValueError: unless 0 <= begin < end and `rate` > 0.
    """
    check_number("begin", begin)
    check_number("end", end)
    check_number("rate", rate)
    if not 0 < rate < math.inf:
        raise ValueError(f"the rate of an exponential ramp must be positive, got {rate}")
    total = rate * (end - begin)
    return _ramp(
        lambda x: jnp.expm1(-total * x) / jnp.expm1(-total),
        lambda x: 1 - math.expm1(-total * x) / math.expm1(-total),
        begin,
        end,
    )


def remaining(ramp: Ramp, step: chex.Numeric, total: Fraction) -> Int32[Array, ""]:
    """How many of `total` are left at a step: `floor(total * (1 - ramp(step)))`.

    Exact for `cubic_ramp` and `linear_ramp`, and computed in float64 for the other ramps of this
    module, whatever the dtype of the step. The value of another function may be off by its rounding
    error: a product that is an integer up to that error counts as the integer.

    Args:
      ramp: a function of the step.
      step: a scalar; may be traced.
      total: what is left before the ramp begins.
    """
    if isinstance(ramp, _Ramp):
        step = jnp.asarray(step)
        if jnp.issubdtype(step.dtype, jnp.floating) and step.dtype.itemsize < 4:
            step = step.astype(jnp.float32)
        # The number that is left falls by one after each of these steps.
        return jnp.sum(step <= jnp.asarray(_last_steps(ramp, total, step.dtype)), dtype=jnp.int32)
    left = 1 - ramp(step)
    # The fraction may be in a wider dtype than a float: `float(total)` is weakly typed.
    left = left + float(jnp.finfo(left.dtype).eps)
    return jnp.minimum(jnp.floor(float(total) * left).astype(jnp.int32), math.floor(total))


@dataclass(frozen=True)
class _Ramp:
    """A ramp whose steps can be compared exactly.

    Attributes:
      shape: x -> fraction, for arrays.
      left: x -> 1 - shape(x), for exact fractions of Python.
      begin: last step at which the fraction is 0.
      end: first step at which the fraction is 1.
    """

    shape: Callable[[jax.Array], jax.Array]
    left: Callable[[Fraction], Fraction | float]
    begin: int | float
    end: int | float

    def __call__(self, step: chex.Numeric) -> jax.Array:
        x = (jnp.asarray(step, jnp.float32) - self.begin) / (self.end - self.begin)
        inside = jnp.clip(self.shape(jnp.clip(x, 0, 1)), 0, 1)
        # Rounding must not leave the fraction below 1 at the end, so the ends are exact.
        return jnp.where(x >= 1, 1.0, jnp.where(x <= 0, 0.0, inside))

    def left_at(self, step: float) -> Fraction | float:
        """The fraction that is left at a step, exact if `left` is."""
        if step <= self.begin:
            return 1
        if step >= self.end:
            return 0
        begin, end = Fraction(self.begin), Fraction(self.end)
        return self.left((Fraction(step) - begin) / (end - begin))


def _ramp(
    shape: Callable[[jax.Array], jax.Array],
    left: Callable[[Fraction], Fraction | float],
    begin: float,
    end: float,
) -> Ramp:
    check_number("begin", begin)
    check_number("end", end)
    if not 0 <= begin < end < math.inf:
        raise ValueError(f"a ramp needs 0 <= begin < end, got begin={begin}, end={end}")
    return _Ramp(shape, left, _python_number(begin), _python_number(end))


def _python_number(x: float) -> int | float:
    """NumPy's numbers would overflow in exact fractions."""
    try:
        return operator.index(x)  # type: ignore[arg-type]
    except TypeError:
        return float(x)


@functools.lru_cache(maxsize=256)  # Layers of the same size share a table.
def _last_steps(ramp: _Ramp, total: Fraction, dtype: np.dtype) -> np.ndarray:
    """For j = 1, 2, ..., floor(total): the last step of a dtype at which at least j are left."""
    places, step_at = _steps(ramp, dtype)
    left_at = functools.cache(lambda place: ramp.left_at(step_at(place)))

    def last(j: int) -> int | float:
        # The fraction that is left falls, so the steps at which too little is left come last.
        few = bisect.bisect_left(places, True, key=lambda place: left_at(place) < j / total)
        return step_at(places[max(few - 1, 0)])

    return np.array([last(j) for j in range(1, math.floor(total) + 1)], dtype)


def _steps(ramp: _Ramp, dtype: np.dtype) -> tuple[range, Callable[[int], int | float]]:
    """The numbers of a dtype from the begin of a ramp to its end, in order, as places in a range.

    Returns:
      The places, and a function from a place to its number.
    """
    if np.issubdtype(dtype, np.integer):
        first, last = math.floor(ramp.begin), math.ceil(ramp.end)
        highest = int(np.iinfo(dtype).max)
        return range(min(first, highest), min(last, highest) + 1), int
    # Floats that are not negative sort like the integers with the same bits.
    bits = np.dtype(f"int{8 * dtype.itemsize}")
    first, last = (int(np.array(x, dtype).view(bits)) for x in (ramp.begin, ramp.end))
    # The begin may have been rounded up, and the end down.
    places = range(max(first - 1, 0), last + 2)
    return places, lambda place: float(np.array(place, bits).view(dtype))
