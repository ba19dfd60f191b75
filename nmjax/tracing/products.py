"""Matrix products and convolutions: the role of each axis of their operands, and their cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from nmjax.tracing.walk import shape_of

if TYPE_CHECKING:
    from jax.extend import core

Axes = tuple[int, ...]


class Side(NamedTuple):
    """One operand of a product.

    Attributes:
      reduction: axes that the product sums over.
      output: axes that it keeps. All other axes but the taps belong to a batch.
      taps: axes that a convolution slides along.
      groups: feature groups of a convolution.
      is_followed: whether a weight may be this operand. The image of a convolution may not.
    """

    reduction: Axes
    output: Axes
    taps: Axes = ()
    groups: int = 1
    is_followed: bool = True


class Product(NamedTuple):
    """A product of two operands.

    Attributes:
      sides: of both operands.
      multiply_adds: of one run.
    """

    sides: tuple[Side, Side]
    multiply_adds: int


def read_product(equation: core.JaxprEqn) -> Product | None:
    """What an equation multiplies; None if it is not a matrix product or a convolution."""
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted, batch = parameters["dimension_numbers"]
        return _dot(equation, contracted, batch)
    if name == "ragged_dot_general":
        numbers = parameters["ragged_dot_dimension_numbers"]
        contracted, batch = numbers.dot_dimension_numbers
        # Each row of the left operand meets one matrix of the stack on the right.
        stack = (*batch[1], *numbers.rhs_group_dimensions)
        return _dot(equation, contracted, (batch[0], stack))
    if name == "conv_general_dilated":
        return _convolution(equation)
    return None


def _dot(
    equation: core.JaxprEqn, contracted: tuple[Axes, Axes], batch: tuple[Axes, Axes]
) -> Product:
    shapes = [shape_of(operand) for operand in equation.invars[:2]]
    sides = [
        Side(
            tuple(contracted[i]),
            tuple(a for a in range(len(shape)) if a not in (*contracted[i], *batch[i])),
        )
        for i, shape in enumerate(shapes)
    ]
    summed = math.prod(shapes[0][axis] for axis in contracted[0])
    outputs = math.prod(shape_of(equation.outvars[0]))
    return Product((sides[0], sides[1]), outputs * summed)


def _convolution(equation: core.JaxprEqn) -> Product:
    parameters = equation.params
    numbers, groups = parameters["dimension_numbers"], parameters["feature_group_count"]
    out, into, *taps = numbers.rhs_spec
    shape = shape_of(equation.invars[1])
    # A transposed convolution puts zeros between its inputs, which do not count.
    stride = math.prod(parameters["lhs_dilation"])
    outputs = math.prod(shape_of(equation.outvars[0]))
    return Product(
        (
            Side((numbers.lhs_spec[1],), (numbers.lhs_spec[0],), is_followed=False),
            # A batch group count appears in derivatives only.
            Side((into,), (out,), tuple(taps), groups, parameters["batch_group_count"] == 1),
        ),
        outputs * math.prod(shape) // (shape[out] * stride),
    )
