"""What is known of a value in a program: which weights it comes from, and where they are in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nmjax.tracing.operations import KEEP_ZEROS
from nmjax.tracing.views import View, merged


@dataclass(frozen=True)
class Value:
    """A value of a program, as the search for products of weights sees it.

    Attributes:
      weights: the weights that it was computed from; empty if it depends on the input too.
      views: where the entries of weights are in it. A value that depends on the input has views
        only if the input picked or scaled a weight.
      is_activation: whether it depends on the input.
      is_one_hot: whether its entries compare the input with something: a product with it looks
        entries up.
      is_zero: whether it is the constant 0.
      lost_in: operations after which a weight could not be followed.
    """

    weights: frozenset[str] = frozenset()
    views: tuple[View, ...] = ()
    is_activation: bool = False
    is_one_hot: bool = False
    is_zero: bool = False
    lost_in: frozenset[str] = frozenset()

    @property
    def is_weight(self) -> bool:
        """Whether it comes from weights alone."""
        return bool(self.weights)

    @property
    def is_broadcast(self) -> bool:
        """Whether it repeats a weight along an axis of its own, such as a batch."""
        return any(view.is_broadcast for view in self.views)

    def moved(self, operation: str, move: Callable[[View], View | None]) -> Value:
        """The value after an operation that only moves its entries."""
        views = tuple(view for view in map(move, self.views) if view is not None)
        lost = {operation} if len(views) < len(self.views) else set()
        return dataclasses.replace(self, views=views, lost_in=self.lost_in | lost)


CONSTANT = Value()
ZERO = Value(is_zero=True)
ACTIVATION = Value(is_activation=True)


def combined(operation: str, operands: Sequence[Value], ranks: Sequence[int]) -> Value:
    """The value of an operation that combines its operands entry by entry.

    Args:
      operation: the primitive's name.
      operands: what is known of them.
      ranks: their numbers of axes; scalars combine with every entry.
    """
    if any(operand.is_activation for operand in operands):
        return _with_activation(operation, operands)
    weights = frozenset(name for operand in operands for name in operand.weights)
    lost = {name for operand in operands for name in operand.lost_in}
    views: list[View] = []
    # A view of a scalar says nothing about the other entries.
    full = [operand for operand, rank in zip(operands, ranks, strict=True) if rank == max(ranks)]
    for leaf in dict.fromkeys(view.leaf for operand in full for view in operand.views):
        view = merged([v for operand in full for v in operand.views if v.leaf == leaf])
        if view is None:
            lost.add(operation)
        elif _keeps_zeros(operation, operands, leaf):
            views.append(dataclasses.replace(view, keeps_zeros=True))
        else:
            views.append(view.changed())
    is_zero = all(operand.is_zero for operand in operands) and operation in KEEP_ZEROS
    return Value(weights, tuple(views), is_zero=is_zero, lost_in=frozenset(lost))


def _with_activation(operation: str, operands: Sequence[Value]) -> Value:
    """Only weights that the input picks or scales are followed any further."""
    one_hot = operation == "eq" or (operation == "convert_element_type" and operands[0].is_one_hot)
    scaled = operands if operation == "mul" else operands[:1]
    views = [operand.views for operand in scaled if operand.views and _is_matrix(operand)]
    is_followed = operation in ("mul", "div") or (operation in KEEP_ZEROS and len(operands) == 1)
    kept = views[0] if is_followed and len(views) == 1 else ()
    return Value(views=kept, is_activation=True, is_one_hot=one_hot)


def _is_matrix(value: Value) -> bool:
    """Whether the value may be a weight that depends on the input, and is not a bias or a gain."""
    is_whole = value.is_activation or not value.is_broadcast
    return is_whole and any(len(view.weight_axes) > 1 for view in value.views)


def _keeps_zeros(operation: str, operands: Sequence[Value], leaf: str) -> bool:
    """Whether the result is zero where the weight is, if the operands are."""

    def is_zero_with(operand: Value) -> bool:
        views = [view for view in operand.views if view.leaf == leaf]
        return operand.is_zero or any(view.keeps_zeros for view in views)

    if operation == "mul":
        return any(map(is_zero_with, operands))
    if operation in ("div", "rem", "integer_pow") or len(operands) == 1:
        return is_zero_with(operands[0]) and (operation in KEEP_ZEROS or len(operands) > 1)
    if operation == "select_n":  # The first operand chooses between the others.
        return all(map(is_zero_with, operands[1:]))
    if operation == "clamp":  # The bounds lie around zero in every program that clips weights.
        return is_zero_with(operands[1])
    if operation in ("max", "min"):
        return any(map(is_zero_with, operands))
    return operation in ("add", "add_any", "sub") and all(map(is_zero_with, operands))


def concatenated(operands: Sequence[Value]) -> Value:
    """The value of a concatenation: the pieces of its parts lie side by side."""
    if any(operand.is_activation for operand in operands):
        return ACTIVATION
    weights = frozenset(name for operand in operands for name in operand.weights)
    lost = {name for operand in operands for name in operand.lost_in}
    views: list[View] = []
    for leaf in sorted(weights):
        # Parts of the same weight, put together again in any order.
        found = {view for operand in operands for view in _views_of(leaf, operand)}
        if len(found) == 1:
            views += found
        else:
            lost.add("concatenate")
    return Value(weights, tuple(views), lost_in=frozenset(lost))


def joined(a: Value, b: Value) -> Value:
    """The value of a variable that is `a` or `b`.

    The set of views of a weight only shrinks, so that joining ends in a fixed point.
    """
    if a.is_activation or b.is_activation:
        return Value(
            views=tuple(view for view in a.views if view in b.views),
            is_activation=True,
            is_one_hot=a.is_one_hot and b.is_one_hot,
        )
    views: list[View] = []
    lost = set(a.lost_in | b.lost_in)
    for leaf in sorted(a.weights | b.weights):
        found = [_views_of(leaf, value) for value in (a, b) if leaf in value.weights]
        different = {view for each in found for view in each}
        if all(found) and len(different) == 1:
            views += different
        elif any(found):
            lost.add("a branch or a loop")
    return Value(
        a.weights | b.weights,
        tuple(views),
        is_zero=a.is_zero and b.is_zero,
        lost_in=frozenset(lost),
    )


def _views_of(leaf: str, value: Value) -> list[View]:
    return [view for view in value.views if view.leaf == leaf]
