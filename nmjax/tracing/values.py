"""What is known of a value in a program: which weights it comes from, and where they are in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nmjax.tracing.operations import KEEP_ZEROS
from nmjax.tracing.order import Order
from nmjax.tracing.views import Shape, View, either, merged, no_axis, whole

# What `lost_in` says of weights that were multiplied by each other before they met the input.
PRODUCT = "a product without an input"


@dataclass(frozen=True)
class Value:
    """A value of a program, as the search for products of weights sees it.

    A value with weights may be the weight of a product. It may depend on the input as well, if the
    input picks a weight from a stack, or scales it. All other values that depend on the input are
    activations.

    Attributes:
      weights: the weights that it was computed from; empty for an activation.
      views: where the entries of these weights are in it.
      depends_on_input: whether it does.
      extent: of an activation, a view that has no axis where the activation repeats itself; None
        if it varies along all axes.
      is_one_hot: whether it compares the input with 0, 1, 2 ...: products with it look entries up.
      is_iota: whether it is the constant 0, 1, 2 ... along some axis.
      number: the number that all of its entries are, if that is known.
      lost_in: operations after which a weight could not be followed.
    """

    weights: frozenset[str] = frozenset()
    views: tuple[View, ...] = ()
    depends_on_input: bool = False
    extent: View | None = None
    is_one_hot: bool = False
    is_iota: bool = False
    number: float | None = None
    lost_in: frozenset[str] = frozenset()

    @property
    def is_activation(self) -> bool:
        """Whether it depends on the input, and is not a weight."""
        return self.depends_on_input and not self.weights

    @property
    def is_weight(self) -> bool:
        """Whether it comes from weights alone."""
        return bool(self.weights) and not self.depends_on_input

    def views_of(self, leaf: str) -> list[View]:
        """The views of one weight; one, or none if it was lost."""
        return [view for view in self.views if view.leaf == leaf]

    def moved(self, operation: str, move: Callable[[View], View | None], shape: Shape) -> Value:
        """The value after an operation that only moves its entries; `shape` is the one before."""
        views = tuple(view for view in map(move, self.views) if view is not None)
        lost = {operation} if len(views) < len(self.views) else set()
        extent = move(self.extent or whole("", shape)) if self.is_activation else None
        if extent is not None:
            extent = extent.with_orders({axis: Order() for axis in range(len(extent.shape))})
        return dataclasses.replace(self, views=views, extent=extent, lost_in=self.lost_in | lost)

    def is_matrix(self, shape: Shape) -> bool:
        """Whether it may hold a weight with two axes or more; `shape` is its own."""
        if self.views:
            return any(len(view.weight_axes) > 1 for view in self.views)
        return bool(self.weights) and len(shape) > 1

    def given_by_input(self, shape: Shape) -> Value:
        """What the input picks from it: a matrix is still a weight, a vector is an activation."""
        if not self.is_matrix(shape):
            return ACTIVATION
        return dataclasses.replace(self, depends_on_input=True)


CONSTANT = Value()
ACTIVATION = Value(depends_on_input=True)


def combined(operation: str, operands: Sequence[Value], shapes: Sequence[Shape]) -> Value:
    """The value of an operation that combines its operands entry by entry.

    Args:
      operation: the primitive's name.
      operands: what is known of them.
      shapes: their shapes. An axis of size 1 and a scalar combine with every entry.
    """
    shape = _broadcast_shape(shapes)
    wide = [_widened(operand, own, shape) for operand, own in zip(operands, shapes, strict=True)]
    if not any(operand.weights for operand in wide):
        return _without_weights(operation, wide, shapes)
    if not all(_scales(operand, wide, shape) for operand in wide if operand.is_activation):
        return ACTIVATION
    lost = {name for operand in wide for name in operand.lost_in}
    views: list[View] = []
    for leaf in dict.fromkeys(view.leaf for operand in wide for view in operand.views):
        found = [v for operand in wide for v in operand.views_of(leaf) if len(v.axes) == len(shape)]
        view = merged(found) if found else None
        if view is None:
            lost.add(operation)
        else:
            keeps = _keeps_zeros(operation, wide, leaf)
            views.append(dataclasses.replace(view, keeps_zeros=keeps))
    return Value(
        frozenset(name for operand in wide for name in operand.weights),
        tuple(views),
        any(operand.depends_on_input for operand in wide),
        lost_in=frozenset(lost),
    )


def _without_weights(operation: str, operands: Sequence[Value], shapes: Sequence[Shape]) -> Value:
    if not any(operand.depends_on_input for operand in operands):
        number = operands[0].number if operation in ("convert_element_type", "copy") else None
        return Value(is_iota=any(operand.is_iota for operand in operands), number=number)
    extents = [
        operand.extent
        for operand, shape in zip(operands, shapes, strict=True)
        if operand.depends_on_input or not (operand.number is not None or shape == ())
    ]
    known = [extent for extent in extents if extent is not None]
    return Value(
        depends_on_input=True,
        extent=_union(known) if len(known) == len(extents) else None,
        is_one_hot=_is_one_hot(operation, operands),
    )


def _union(extents: Sequence[View]) -> View:
    """An extent with the axes along which any of the extents has one."""
    first, *others = extents
    for other in others:
        first = first.at(
            [
                a if any(piece.axis is not None for piece in a) else b
                for a, b in zip(first.axes, other.axes, strict=True)
            ]
        )
    return first


def _is_one_hot(operation: str, operands: Sequence[Value]) -> bool:
    if operation == "eq":
        return any(operand.is_iota for operand in operands)
    if operation in ("mul", "and") or (operation in KEEP_ZEROS and len(operands) == 1):
        return any(operand.is_one_hot for operand in operands)
    if operation == "select_n":
        decider, *cases = operands
        return decider.is_one_hot and all(case.number is not None for case in cases)
    return False


def _scales(activation: Value, operands: Sequence[Value], shape: Shape) -> bool:
    """Whether an activation repeats itself along an axis of a matrix among the operands.

    If it does, it scales or shifts the matrix, which may take part in a product later. If it does
    not, the matrix is a gate, a position embedding, or another operand of the activation.
    """
    if activation.extent is None:
        return False
    repeated = {
        axis
        for axis, pieces in enumerate(activation.extent.axes)
        if all(piece.axis is None for piece in pieces) and shape[axis] > 1
    }
    for operand in operands:
        if operand.weights and operand.is_matrix(shape):
            axes = {
                axis
                for view in operand.views
                for axis, pieces in enumerate(view.axes)
                if any(piece.axis is not None for piece in pieces)
            }
            if repeated & axes or (not operand.views and repeated):
                return True
    return False


def _broadcast_shape(shapes: Sequence[Shape]) -> Shape:
    rank = max(map(len, shapes))
    full = [shape for shape in shapes if len(shape) == rank]
    return tuple(map(max, *full)) if len(full) > 1 else full[0]


def _widened(operand: Value, own: Shape, shape: Shape) -> Value:
    """The operand with axes of size 1, and a scalar, repeated to the shape of the result."""
    if own == shape:
        return operand

    def widen(view: View) -> View:
        if len(own) < len(shape):
            return view.at([no_axis(size) for size in shape])
        return view.at(
            [
                pieces if before == after else no_axis(after)
                for pieces, before, after in zip(view.axes, own, shape, strict=True)
            ]
        )

    return operand.moved("broadcast", widen, own)


def _keeps_zeros(operation: str, operands: Sequence[Value], leaf: str) -> bool:
    """Whether the result is zero where the weight is, if the operands are."""

    def is_zero_with(operand: Value) -> bool:
        return operand.number == 0 or any(view.keeps_zeros for view in operand.views_of(leaf))

    def number(index: int, default: float) -> float:
        # Bounds that are not literals, as of learned quantization, are taken to lie around zero.
        found = operands[index].number
        return default if found is None else found

    if operation == "mul":
        return any(map(is_zero_with, operands))
    if operation in ("div", "rem", "integer_pow") or len(operands) == 1:
        return is_zero_with(operands[0]) and (operation in KEEP_ZEROS or len(operands) > 1)
    if operation == "select_n":  # The first operand chooses between the others.
        return all(map(is_zero_with, operands[1:]))
    if operation == "clamp":
        return is_zero_with(operands[1]) and number(0, -1) <= 0 <= number(2, 1)
    if operation in ("max", "min"):
        side = 1 if operation == "max" else -1
        weight, bound = sorted((0, 1), key=lambda index: not is_zero_with(operands[index]))
        is_zero = is_zero_with(operands[bound]) or side * number(bound, -side) <= 0
        return is_zero_with(operands[weight]) and is_zero
    return operation in ("add", "add_any", "sub") and all(map(is_zero_with, operands))


def concatenated(operands: Sequence[Value], views: Sequence[Sequence[View]]) -> Value:
    """The value of a concatenation or a stack, whose parts lie side by side.

    Args:
      operands: the parts.
      views: the views of each part, as they are in the whole.
    """
    # Tokens beside those of the input, as of a class.
    if any(operand.is_activation for operand in operands):
        return ACTIVATION
    weights = frozenset(name for operand in operands for name in operand.weights)
    lost = {name for operand in operands for name in operand.lost_in}
    joint: list[View] = []
    for leaf in sorted(weights):
        # Parts of the same weight, put together again in any order.
        found = [view for part in views for view in part if view.leaf == leaf]
        view = either(found) if found else None
        if view is not None:
            joint.append(view)
        else:
            lost.add("concatenate")
    depends = any(operand.depends_on_input for operand in operands)
    return Value(weights, tuple(joint), depends, lost_in=frozenset(lost))


def joined(a: Value, b: Value) -> Value:
    """The value of a variable that is `a` or `b`.

    Weights are only added, and views only dropped, so that joining ends in a fixed point.
    """
    if a == b:
        return a
    views: list[View] = []
    lost = set(a.lost_in | b.lost_in)
    for leaf in sorted(a.weights | b.weights):
        # A constant, such as an initial state, has nothing to say about the weight.
        found = [v.views_of(leaf) for v in (a, b) if leaf in v.weights or v.is_activation]
        view = either([view for each in found for view in each]) if any(found) else None
        if all(found) and view is not None:
            views.append(view)
        else:
            lost.add("a branch or a loop")
    return Value(
        a.weights | b.weights,
        tuple(views),
        a.depends_on_input or b.depends_on_input,
        is_one_hot=a.is_one_hot and b.is_one_hot,
        number=a.number if a.number == b.number else None,
        lost_in=frozenset(lost),
    )
