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
from typing import TYPE_CHECKING, NamedTuple

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
    return _ramp(_CUBIC, begin, end)


def linear_ramp(begin: float, end: float) -> Ramp:
    """Rises in proportion to the time since `begin`. Arguments and errors as in `cubic_ramp`."""
    return _ramp(_LINEAR, begin, end)


def cosine_ramp(begin: float, end: float) -> Ramp:
    """Rises like a quarter of a cosine, slow at first. Arguments and errors as in `cubic_ramp`."""
    return _ramp(_COSINE, begin, end)


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
    curve = _Curve(
        lambda x: jnp.expm1(-total * x) / jnp.expm1(-total),
        lambda part, whole: (
            1 - math.expm1(-total * (part / whole)) / math.expm1(-total)
        ).as_integer_ratio(),
        lambda left: -np.log1p((1 - left) * math.expm1(-total)) / total,
    )
    return _ramp(curve, begin, end)


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


class _Curve(NamedTuple):
    """How a ramp rises.

    Attributes:
      shape: x -> fraction, for arrays.
      left: (part, whole) -> 1 - shape(part / whole), as a numerator and a denominator. The
        arguments and the results are integers of Python, so that they can be compared exactly.
      x_at: 1 - shape(x) -> about x, for arrays of NumPy.
    """

    shape: Callable[[jax.Array], jax.Array]
    left: Callable[[int, int], tuple[int, int]]
    x_at: Callable[[np.ndarray], np.ndarray]


_CUBIC = _Curve(
    lambda x: x**3,
    lambda part, whole: (whole**3 - part**3, whole**3),
    lambda left: np.cbrt(1 - left),
)
_LINEAR = _Curve(lambda x: x, lambda part, whole: (whole - part, whole), lambda left: 1 - left)
_COSINE = _Curve(
    lambda x: 1 - jnp.cos(jnp.pi * x / 2),
    lambda part, whole: math.cos(math.pi * (part / whole) / 2).as_integer_ratio(),
    lambda left: np.arccos(left) * 2 / np.pi,
)


@dataclass(frozen=True)
class _Ramp:
    """A ramp whose steps can be compared exactly.

    Attributes:
      curve: how it rises.
      begin: last step at which the fraction is 0.
      end: first step at which the fraction is 1.
    """

    curve: _Curve
    begin: int | float
    end: int | float

    def __call__(self, step: chex.Numeric) -> jax.Array:
        x = (jnp.asarray(step, jnp.float32) - self.begin) / (self.end - self.begin)
        inside = jnp.clip(self.curve.shape(jnp.clip(x, 0, 1)), 0, 1)
        # Rounding must not leave the fraction below 1 at the end, so the ends are exact.
        return jnp.where(x >= 1, 1.0, jnp.where(x <= 0, 0.0, inside))

    def left_at(self, step: float) -> tuple[int, int]:
        """The fraction that is left at a step, as a numerator and a denominator."""
        if step <= self.begin:
            return 1, 1
        if step >= self.end:
            return 0, 1
        (n, d), (begin, begin_d), (end, end_d) = (
            number.as_integer_ratio() for number in (step, self.begin, self.end)
        )
        part, whole = (n * begin_d - begin * d) * end_d, (end * begin_d - begin * end_d) * d
        return self.curve.left(part, whole)


def _ramp(curve: _Curve, begin: float, end: float) -> Ramp:
    check_number("begin", begin)
    check_number("end", end)
    if not 0 <= begin < end < math.inf:
        raise ValueError(f"a ramp needs 0 <= begin < end, got begin={begin}, end={end}")
    return _Ramp(curve, _python_number(begin), _python_number(end))


def _python_number(x: float) -> int | float:
    """NumPy's numbers would overflow in exact fractions."""
    try:
        return operator.index(x)  # type: ignore[arg-type]
    except TypeError:
        return float(x)


@functools.lru_cache(maxsize=256)  # Layers of the same size share a table.
def _last_steps(ramp: _Ramp, total: Fraction, dtype: np.dtype) -> np.ndarray:
    """For j = 1, 2, ..., floor(total): the last step of a dtype at which at least j are left."""
    steps = _Steps(dtype)
    # The begin may be rounded up, and the end down.
    first = max(steps.place(ramp.begin) - 1, 0)
    last = min(steps.place(ramp.end) + 1, steps.place(steps.highest))
    counts = range(1, math.floor(total) + 1)

    def are_left(j: int, place: int) -> bool:
        numerator, denominator = ramp.left_at(steps.step(place))
        return numerator * total.numerator >= j * total.denominator * denominator

    x = ramp.curve.x_at(np.array(counts) / float(total))
    guesses = float(ramp.begin) + x * float(ramp.end - ramp.begin)
    places = [
        _last_place(
            functools.partial(are_left, j), min(max(steps.place(guess), first), last), first, last
        )
        for j, guess in zip(counts, guesses.tolist(), strict=True)
    ]
    return np.array([steps.step(place) for place in places], dtype)


def _last_place(holds: Callable[[int], bool], guess: int, first: int, last: int) -> int:
    """The last place from `first` to `last` where something holds; it holds before, not after.

    Looks at two places if the guess is right. It takes for granted that `first` holds.
    """
    low, high, stride = guess, guess + 1, 1
    while low > first and not holds(low):
        low, high, stride = max(low - stride, first), low, 2 * stride
    while high <= last and holds(high):
        low, high, stride = high, min(high + stride, last + 1), 2 * stride
    between = range(low + 1, high)
    return low + bisect.bisect_left(between, True, key=lambda place: not holds(place))


class _Steps:
    """The numbers of a dtype from 0 to the highest finite one, by their place in this order."""

    def __init__(self, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._is_integer = np.issubdtype(dtype, np.integer)
        # Floats that are not negative sort like the integers with the same bits.
        self._bits = np.dtype(f"int{8 * dtype.itemsize}")
        self.highest = int(np.iinfo(dtype).max) if self._is_integer else float(np.finfo(dtype).max)

    def place(self, step: float) -> int:
        """The place of the number at a step or next to it."""
        step = min(step, self.highest)
        return int(step) if self._is_integer else int(np.array(step, self._dtype).view(self._bits))

    def step(self, place: int) -> int | float:
        """The number at a place."""
        return place if self._is_integer else float(np.array(place, self._bits).view(self._dtype))
