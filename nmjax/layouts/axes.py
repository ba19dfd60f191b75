"""The roles of a weight's axes: what the matmul sums over, what it keeps, and taps.

Axes are negative, so additional leading axes (a stack of seeds) make no difference.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

Shape = tuple[int, ...]


class Axes(NamedTuple):
    """The roles of a weight's axes, as negative numbers. Axes in none of the fields are a stack.

    Attributes:
      reduction: axes that the matmul sums over, in order.
      output: axes that the matmul keeps, in order.
      taps: spatial axes of a convolution, in order; None if the shape does not determine whether
        axes are taps or a stack of layers.
    """

    reduction: tuple[int, ...]
    output: tuple[int, ...]
    taps: tuple[int, ...] | None = ()


class Unknown(NamedTuple):
    """Why the axes of a leaf are not certain."""

    reason: str


GivenAxes = int | tuple[int, ...] | Axes


def given_axes(given: GivenAxes, ndim: int) -> Axes:
    """Completes and checks the axes that a user gives for a weight with `ndim` axes.

    Args:
      given: `Axes`, or the reduction axes; all other axes then count as outputs. With more than two
        axes, that does not say which are taps and which are a stack.
      ndim: number of axes of the weight.

    Raises:
      TypeError: an axis is not an integer.
      ValueError: an axis is out of range or given twice.

    >>> given_axes(0, 2)
    Axes(reduction=(-2,), output=(-1,), taps=())
    """
    spans = given if isinstance(given, Axes) else Axes(given, ())  # type: ignore[arg-type]
    reduction, output, taps = (_negative(span, ndim) for span in spans)
    named = (*reduction, *output, *taps)
    if not reduction:
        raise TypeError("the reduction axes must be one or more integers, got none")
    if len(set(named)) != len(named):
        raise ValueError(f"an axis is given twice among {named}")
    if isinstance(given, Axes):
        return Axes(reduction, output, taps)
    others = tuple(axis for axis in range(-ndim, 0) if axis not in reduction)
    return Axes(reduction, others, () if ndim == 2 else None)


def _negative(given: Any, ndim: int) -> tuple[int, ...]:
    axes = given if isinstance(given, tuple | list) else (given,)
    if any(isinstance(axis, bool) or not hasattr(axis, "__index__") for axis in axes):
        raise TypeError(f"axes must be one or more integers, got {given!r}")
    if not all(-ndim <= axis < ndim for axis in axes):
        raise ValueError(f"axes {given} are out of range: the weight has {ndim} axes")
    return tuple(operator.index(axis) - (ndim if axis >= 0 else 0) for axis in axes)


def size_along(shape: Shape, axes: tuple[int, ...]) -> int:
    """The product of the sizes of `axes`."""
    return math.prod(shape[axis] for axis in axes)
