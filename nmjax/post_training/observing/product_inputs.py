"""What a product multiplies by a planned weight, as a matrix with one row per use of the weight.

A planned weight is a stack of matrices (in, out). Its inputs are flattened in the order (taps,
reduction), so each input of a convolution at each tap is an input of its own. A grouped convolution
has one matrix per feature group, all with inputs of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.patterns.pattern import LeafPlan
from nmjax.tracing.products import Product
from nmjax.tracing.uses import contraction, stack_of_groups
from nmjax.tracing.views import Piece, View
from nmjax.tracing.walk import shape_of
from nmjax.trees.spans import stack_axes

if TYPE_CHECKING:
    from jax.extend import core
    from jaxtyping import Array, Float


class Layout(NamedTuple):
    """How a planned weight is a stack of matrices; axes are non-negative.

    Attributes:
      shape: of the weight.
      stack: axes that number the matrices.
      inputs: axes that the product sums over, in the order in which they are flattened.
      outputs: axes that it keeps.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of inputs."""
        return math.prod(self.shape[axis] for axis in self.inputs)


def layout_of(leaf: LeafPlan, shape: tuple[int, ...]) -> Layout:
    """The layout of a planned weight, which may have more leading axes than the plan says."""
    spans = (leaf.tap_axes + leaf.reduction_axes, leaf.output_axes)
    inputs, outputs = (tuple(axis + len(shape) for axis in span) for span in spans)
    return Layout(shape, tuple(stack_axes(len(shape), spans)), inputs, outputs)


class Inputs(NamedTuple):
    """The inputs of one product.

    Attributes:
      rows: (*stack, groups, rows, in) with the matrices of the stack that the product uses.
      places: for each axis of the weight's stack, the first matrix and their number; the axis is
        in `rows` only if `stack` names it.
      stack: the axes of the weight that `rows` has.
    """

    rows: Float[Array, "*stack groups rows in"]
    places: dict[int, tuple[int, int]]
    stack: tuple[int, ...]


class UnsupportedUseError(NotImplementedError):
    """A use of a weight whose inputs cannot be told apart."""


def read_inputs(
    equation: core.JaxprEqn,
    product: Product,
    side: int,
    view: View,
    x: jax.Array,
    layout: Layout,
) -> Inputs | None:
    """The inputs that an equation multiplies by a weight; None if it only scales the weight.

    Args:
      equation: a matrix product or a convolution.
      product: what it multiplies.
      side: which operand is the weight.
      view: of the weight in that operand.
      x: the other operand.
      layout: of the weight.

    Raises:
      UnsupportedUseError: the plan and the product disagree about the axes; the program has
        reordered the inputs, or takes matrices from the stack by computed numbers.
    """
    own = product.sides[side]
    found = contraction(view, own.reduction, own.output, own.taps, own.groups)
    if not found.reduction or not found.output:
        return None
    _check_axes(found.reduction + found.taps, found.split, view, layout)
    if equation.primitive.name == "dot_general":
        labeled = _of_dot(equation, side, view, x)
    elif equation.primitive.name == "conv_general_dilated":
        labeled = _of_convolution(equation, view, x)
    else:
        raise UnsupportedUseError(
            f"it is multiplied by {equation.primitive.name}, which is not supported"
        )
    return _arranged(*labeled, view, layout)


def _check_axes(summed: Sequence[int], split: Sequence[int], view: View, layout: Layout) -> None:
    axes = {axis + len(layout.shape) for axis in summed}
    if axes != set(layout.inputs) or split:
        given = sorted(axis - len(layout.shape) for axis in layout.inputs)
        raise UnsupportedUseError(
            f"the plan's inputs are the axes {given}, but a product sums over "
            f"{'a part of ' if split else ''}{sorted(summed)}; make the plan from the program: "
            "make_plan(..., forward=, inputs=)"
        )
    for axis in layout.inputs:
        order = view.order(axis)
        if order.aligned or order.start != 0:
            raise UnsupportedUseError(f"the program reorders its inputs by {order.why}")


# What an axis of an array stands for: a piece of the weight's axis, a feature group, or rows.
_ROWS, _GROUP = "rows", "group"
_Label = Piece | str


def _of_dot(
    equation: core.JaxprEqn, side: int, view: View, x: jax.Array
) -> tuple[jax.Array, list[_Label]]:
    """The activation of a matrix product, with its axes cut into pieces of the weight's."""
    contracted, batch = equation.params["dimension_numbers"]
    partner = dict(zip(contracted[1 - side], contracted[side], strict=True))
    partner |= dict(zip(batch[1 - side], batch[side], strict=True))
    sizes: list[int] = []
    labels: list[_Label] = []
    for axis, size in enumerate(x.shape):
        cut = _cut(view.axes[partner[axis]], size) if axis in partner else [(size, _ROWS)]
        sizes += [part for part, _ in cut]
        labels += [label for _, label in cut]
    return x.reshape(sizes), labels


def _cut(pieces: Sequence[Piece], size: int) -> list[tuple[int, _Label]]:
    """An axis of an activation as the pieces of the axis that it meets."""
    labels: list[_Label] = [_ROWS if piece.axis is None else piece for piece in pieces]
    sizes = [piece.size for piece in pieces]
    if math.prod(sizes) == size:
        return list(zip(sizes, labels, strict=True))
    if len(pieces) == 1:  # A slice keeps the piece of the whole axis.
        return [(size, labels[0])]
    raise UnsupportedUseError("the program slices merged axes of it")


def _of_convolution(
    equation: core.JaxprEqn, view: View, x: jax.Array
) -> tuple[jax.Array, list[_Label]]:
    """The patches of a convolution's image, with the axes of the kernel."""
    parameters = equation.params
    numbers, groups = parameters["dimension_numbers"], parameters["feature_group_count"]
    kernel = shape_of(equation.invars[1])
    out, into, *taps = numbers.rhs_spec
    patches = _patches(x.transpose(numbers.lhs_spec), [kernel[tap] for tap in taps], parameters)
    # (*taps, batch, groups * in, *positions), and a group may be a layer of a stack.
    pieces = view.axes[out]
    stack, rest = stack_of_groups(view, pieces, groups)
    cut: list[tuple[int, _Label]] = [(piece.size, piece) for piece in pieces[:stack]]
    cut += [(rest, _GROUP), *_cut(view.axes[into], kernel[into])]
    labels: list[_Label] = []
    sizes: list[int] = []
    for tap in taps:
        for size, label in _cut(view.axes[tap], kernel[tap]):
            sizes, labels = [*sizes, size], [*labels, label]
    sizes += [patches.shape[len(taps)], *(size for size, _ in cut)]
    labels += [_ROWS, *(label for _, label in cut)]
    positions = patches.shape[len(taps) + 2 :]
    return patches.reshape(*sizes, *positions), [*labels, *[_ROWS] * len(positions)]


def _patches(image: jax.Array, taps: Sequence[int], parameters: dict) -> jax.Array:
    """The entries of an image (batch, channels, *space) that each tap meets, taps first."""
    padding, strides = parameters["padding"], parameters["window_strides"]
    inner, outer = parameters["rhs_dilation"], parameters["lhs_dilation"]
    zero = jnp.zeros((), image.dtype)
    around = [(low, high, between - 1) for (low, high), between in zip(padding, outer, strict=True)]
    image = lax.pad(image, zero, [(0, 0, 0), (0, 0, 0), *around])
    found = []
    for place in itertools.product(*map(range, taps)):
        starts = [tap * step for tap, step in zip(place, inner, strict=True)]
        # The last entry that the first tap meets is as far from the end as the last tap is wide.
        limits = [
            size - (tap - 1) * step + start
            for size, tap, step, start in zip(image.shape[2:], taps, inner, starts, strict=True)
        ]
        found.append(
            lax.slice(image, (0, 0, *starts), (*image.shape[:2], *limits), (1, 1, *strides))
        )
    return jnp.stack(found).reshape(*taps, *found[0].shape)


def _arranged(x: jax.Array, labels: list[_Label], view: View, layout: Layout) -> Inputs:
    """Brings the axes of an activation into the order (stack, groups, rows, inputs)."""

    def along(axes: Sequence[int]) -> list[int]:
        """The places of the pieces of these axes, in the order of the weight's entries."""
        named = [(i, label) for i, label in enumerate(labels) if isinstance(label, Piece)]
        own = [(axes.index(p.axis), -p.stride, i) for i, p in named if p.axis in axes]
        return [i for *_, i in sorted(own)]

    places = {i for i, label in enumerate(labels) if isinstance(label, Piece)}
    stack, inputs = along(layout.stack), along(layout.inputs)
    if places - {*stack, *inputs}:
        raise UnsupportedUseError(
            "the program multiplies slices of its outputs by inputs of their own; the plan counts "
            "them as one matrix. Give the axes to make_plan, with nmjax.Axes"
        )
    present = tuple(axis for axis in layout.stack if any(_is_of(labels[i], axis) for i in stack))
    groups = [i for i, label in enumerate(labels) if label == _GROUP]
    rows = [i for i, label in enumerate(labels) if label == _ROWS]
    sizes = [math.prod(x.shape[i] for i in stack if _is_of(labels[i], axis)) for axis in present]
    moved = x.transpose([*stack, *groups, *rows, *inputs])
    count = math.prod(x.shape[i] for i in groups)
    matrix = moved.reshape(*sizes, count, math.prod(x.shape[i] for i in rows), layout.size)
    starts = {axis: view.order(axis).start for axis in layout.stack}
    if any(start is None for start in starts.values()):
        raise UnsupportedUseError("the program takes matrices from its stack by computed numbers")
    lengths = dict(zip(present, sizes, strict=True))
    return Inputs(
        matrix,
        {axis: (start or 0, lengths.get(axis, 1)) for axis, start in starts.items()},
        present,
    )


def _is_of(label: _Label, axis: int) -> bool:
    return isinstance(label, Piece) and label.axis == axis
