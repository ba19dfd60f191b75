"""Checks the numbers that describe a mask: how many weights or blocks it keeps."""

from __future__ import annotations

import math
import numbers
import operator
from fractions import Fraction

import numpy as np


def check_n_of_m(n: int, m: int) -> None:
    """Raises TypeError or ValueError unless `n` and `m` are integers with 1 <= n <= m."""
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not is_integer(value):
            raise TypeError(
                f"{name} must be a Python integer, got {value!r} of type {type(value).__name__}; "
                'inside optax.inject_hyperparams pass the pattern as text, such as "2:4"'
            )
    if not 1 <= n <= m:
        raise ValueError(
            f"a pattern keeps n of every m weights with 1 <= n <= m, got n={n}, m={m}"
            + (f"; did you mean {m}:{n}?" if 1 <= m < n else "")
        )


def check_stride(stride: object) -> None:
    """Raises TypeError or ValueError unless `stride` is an integer >= 1."""
    if isinstance(stride, bool) or not is_integer(stride):
        raise TypeError(
            f"stride must be a Python integer, got {stride!r} of type {type(stride).__name__}"
        )
    if operator.index(stride) < 1:  # type: ignore[arg-type]
        raise ValueError(
            f"stride is the distance between the members of a group, at least 1; got {stride}"
        )


def group_name(m: int, stride: int) -> str:
    """What error messages call the groups.

    >>> group_name(4, 1), group_name(4, 16)
    ('groups of 4', 'groups of 4 with stride 16')
    """
    return f"groups of {m}" + (f" with stride {stride}" if stride > 1 else "")


def check_block(n: int, sparsity: float) -> None:
    """Raises TypeError or ValueError unless `n` is an integer >= 1 and 0 <= `sparsity` < 1."""
    if isinstance(n, bool) or not is_integer(n):
        raise TypeError(f"n must be a Python integer, got {n!r} of type {type(n).__name__}")
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(
            f"sparsity must be a Python number, got {sparsity!r} of type "
            f"{type(sparsity).__name__}; inside optax.inject_hyperparams pass the pattern as text, "
            'such as "1x16@0.5"'
        )
    if n < 1:
        raise ValueError(f"a block holds n >= 1 output channels, got n={n}")
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity is the fraction of blocks to drop, 0 <= sparsity < 1, got {sparsity}"
            + (f"; did you mean {sparsity / 100}?" if 1 < sparsity < 100 else "")
        )


def kept_blocks(sparsity: float, blocks: int) -> int:
    """How many of these blocks are kept: all but `floor(sparsity * blocks)`, computed exactly.

    >>> kept_blocks(0.29, 100)  # In floating point, 0.29 * 100 is 28.999999999999996.
    71
    """
    return blocks - math.floor(as_fraction(sparsity) * blocks)


def as_fraction(sparsity: float) -> Fraction:
    """The fraction that was written as this float: a short one such as 1/3, or else the decimal.

    >>> as_fraction(0.29), as_fraction(1 / 3), as_fraction(0.3333)
    (Fraction(29, 100), Fraction(1, 3), Fraction(3333, 10000))
    """
    sparsity = as_written(sparsity)
    # Two fractions with denominators this small are never the same float.
    short = Fraction(sparsity).limit_denominator(10**6)
    return short if float(short) == sparsity else Fraction(repr(sparsity))


def as_written(number: float) -> float:
    """The Python float for a number; a narrow NumPy float counts as it is written.

    >>> as_written(np.float32(0.29)), float(np.float32(0.29))
    (0.29, 0.28999999165534973)
    """
    if not isinstance(number, np.floating) or np.finfo(type(number)).bits >= 64:
        return float(number)
    # Two fractions with denominators this small are never the same number of this type.
    denominator = int(np.finfo(type(number)).eps ** -0.5 / 2)
    short = float(Fraction(float(number)).limit_denominator(denominator))
    return short if type(number)(short) == number else float(str(number))


def check_number(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a real number of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless a number is finite and above 0; TypeError if it is no number."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and above 0, got {value}")


def is_integer(value: object) -> bool:
    """Whether `value` can serve as an index. Tracers and arrays of several numbers cannot."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
