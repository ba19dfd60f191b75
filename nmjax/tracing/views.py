"""Where the entries of a weight are within a value that a program computes from it.

A view lists, for each axis of the value, the pieces of the weight's axes that it runs over, major
first. A piece is a stretch of one axis: reshaping (in, heads * head) to (in, heads, head) makes two
pieces of the last axis. Axes that came from somewhere else, as by broadcasting, are pieces of no
axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nmjax.tracing.order import Order, together

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A stretch of one axis of a weight.

    Attributes:
      axis: the weight's axis, counted from 0; None for an axis that is not the weight's.
      stride: entries of the weight's axis from one entry of the piece to the next.
      size: number of entries.
    """

    axis: int | None
    stride: int
    size: int


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class View:
    """A value whose entries are those of a weight, maybe changed one by one.

    Attributes:
      leaf: name of the weight.
      shape: of the weight, or of the shard of it that a device holds.
      axes: for each axis of the value, its pieces. They say how the axis is laid out; a slice or a
        concatenation of it keeps them, with another number of entries.
      keeps_zeros: whether the value is zero wherever the weight is zero. If it is not, a sparse
        weight does not make a sparse value.
      orders: for each axis of the weight, the order of its entries; empty if all are as they were.
    """

    leaf: str
    shape: Shape
    axes: tuple[Pieces, ...]
    keeps_zeros: bool = True
    orders: tuple[Order, ...] = ()

    def order(self, axis: int) -> Order:
        """The order along an axis of the weight."""
        return self.orders[axis] if self.orders else Order()

    def with_orders(self, orders: Mapping[int, Order]) -> View:
        """The view with other orders along these axes of the weight."""
        found = tuple(orders.get(axis, self.order(axis)) for axis in range(len(self.shape)))
        # One form only, so that equal views compare equal.
        return dataclasses.replace(self, orders=() if set(found) <= {Order()} else found)

    def cut(self, place: int, length: int, why: str, start: int | None = None) -> View:
        """The view after an operation that moves entries along one of its axes, or drops some.

        Args:
          place: the axis of the value.
          length: stretches of this many of its entries stay together and aligned.
          why: the operation, for an error message.
          start: the first entry of a slice; None for other operations.
        """
        for piece in reversed(self.axes[place]):
            if piece.size and length % piece.size == 0:
                length //= piece.size
                start = None if start is None else start // piece.size
                continue
            if piece.axis is None:
                return self
            aligned = math.gcd(length, piece.size) * piece.stride
            start = None if start is None else start * piece.stride
            order = self.order(piece.axis).cut(aligned, start, why)
            return self.with_orders({piece.axis: order})
        return self

    def reversed(self, place: int, size: int) -> View:
        """The view with an axis of the value, of this size, in reverse order."""
        view = self
        for piece in self.axes[place]:
            if piece.axis is not None and piece.size > 1:
                aligned = math.gcd(size, piece.size) * piece.stride
                order = view.order(piece.axis).cut(aligned, None, "a reversal")
                view = view.with_orders({piece.axis: order})
        return view

    @property
    def weight_axes(self) -> frozenset[int]:
        """The axes of the weight that the value runs over."""
        return frozenset(p.axis for pieces in self.axes for p in pieces if p.axis is not None)

    @property
    def is_broadcast(self) -> bool:
        """Whether the value repeats the weight."""
        return any(p.axis is None and p.size > 1 for pieces in self.axes for p in pieces)

    def changed(self) -> View:
        """The view after an operation that need not keep zeros."""
        return dataclasses.replace(self, keeps_zeros=False)

    def at(self, axes: Sequence[Pieces]) -> View:
        """The same entries along other axes."""
        return dataclasses.replace(self, axes=tuple(axes))

    def pick(self, axes: Sequence[int]) -> View:
        """The view whose axes are these ones of this view: transposed, or with some left out."""
        return self.at([self.axes[axis] for axis in axes])

    def without(self, axes: Sequence[int]) -> View:
        """The view without these axes."""
        return self.pick([axis for axis in range(len(self.axes)) if axis not in axes])

    def reshaped(self, before: Shape, after: Shape) -> View | None:
        """The view after a reshape; None if the pieces do not fit the new axes."""
        if 0 in before:
            return None
        axes: list[Pieces] = [()] * len(after)
        for old, new in _groups(before, after):
            if len(old) == 1 and len(new) == 1:
                axes[new[0]] = self.axes[old[0]]
                continue
            pieces = [piece for axis in old for piece in self.axes[axis]]
            # A slice has fewer entries than its pieces, so it cannot be cut at the right places.
            if any(_size(self.axes[axis]) != before[axis] for axis in old):
                return None
            cut = _cut(pieces, [after[axis] for axis in new])
            if cut is None:
                return None
            for axis, part in zip(new, cut, strict=True):
                axes[axis] = part
        return self.at(axes)

    def resized(self, sizes: Shape) -> View:
        """The view of a shard of the value, or of the value of a shard."""
        shape, axes = list(self.shape), list(self.axes)
        for i, (pieces, size) in enumerate(zip(self.axes, sizes, strict=True)):
            axis = pieces[0].axis if len(pieces) == 1 else None
            # A whole axis of the weight becomes a whole axis of a smaller weight.
            if axis is not None and pieces[0].size == self.shape[axis]:
                axes[i], shape[axis] = (pieces[0]._replace(size=size),), size
        return dataclasses.replace(self, shape=tuple(shape), axes=tuple(axes))


def whole(leaf: str, shape: Shape) -> View:
    """The view of a weight itself."""
    return View(leaf, shape, tuple((Piece(axis, 1, size),) for axis, size in enumerate(shape)))


def no_axis(size: int) -> Pieces:
    """The pieces of an axis that is not a weight's."""
    return (Piece(None, 1, size),)


def merged(views: Sequence[View]) -> View | None:
    """One view for an operation that combines several of the same weight entry by entry.

    None if they put different entries of the weight at the same place.
    """
    # A mask, which does not keep zeros, may come from slices, and says nothing about the order of
    # what it is applied to. Neither does a view without an axis, such as a norm.
    ordered = [view for view in views if view.keeps_zeros] or views
    orders = {
        axis: {view.order(axis) for view in ordered if axis in view.weight_axes}
        for axis in frozenset().union(*(view.weight_axes for view in ordered))
    }
    if any(len({order.start for order in found}) > 1 for found in orders.values()):
        return None
    axes = []
    for places in zip(*(view.axes for view in views), strict=True):
        named = {pieces for pieces in places if any(p.axis is not None for p in pieces)}
        if len(named) > 1:
            return None
        axes.append(next(iter(named), places[0]))
    joint = {axis: together(sorted(found)) for axis, found in orders.items()}
    return views[0].at(axes).with_orders(joint)


def either(views: Sequence[View]) -> View | None:
    """One view for parts of the same weight side by side, or for one of them.

    None if they run over different axes of the weight, or lay them out differently.
    """
    first = views[0]
    if len({dataclasses.replace(view, orders=()) for view in views}) > 1:
        return None
    axes = range(len(first.shape))
    return first.with_orders({a: together([view.order(a) for view in views]) for a in axes})


def _size(pieces: Pieces) -> int:
    return math.prod(piece.size for piece in pieces)


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Pairs of axes before and after a reshape that hold the same entries, as few as possible."""
    groups: list[tuple[list[int], list[int]]] = []
    # Axes of size 1 hold nothing, so they belong to no group.
    olds = [axis for axis, size in enumerate(before) if size != 1]
    news = [axis for axis, size in enumerate(after) if size != 1]
    while olds and news:
        old, new = [olds.pop(0)], [news.pop(0)]
        sizes = before[old[0]], after[new[0]]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                old.append(olds.pop(0))
                sizes = sizes[0] * before[old[-1]], sizes[1]
            else:
                new.append(news.pop(0))
                sizes = sizes[0], sizes[1] * after[new[-1]]
        groups.append((old, new))
    return groups


def _cut(pieces: list[Piece], sizes: list[int]) -> list[Pieces] | None:
    """Distributes pieces over axes of these sizes; None if a piece cannot be cut evenly."""
    rest, axes = [piece for piece in pieces if piece.size != 1], []
    for size in sizes:
        part: list[Piece] = []
        while size > 1:
            piece = rest.pop(0)
            if size % piece.size == 0:
                part.append(piece)
                size //= piece.size
            elif piece.size % size == 0:
                inner = piece.size // size
                part.append(Piece(piece.axis, piece.stride * inner, size))
                rest.insert(0, piece._replace(size=inner))
                size = 1
            else:
                return None
        axes.append(_joined(part))
    return axes


def _joined(pieces: list[Piece]) -> Pieces:
    """Joins neighboring pieces that continue each other."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and last.axis == piece.axis and last.stride == piece.stride * piece.size:
            joined[-1] = piece._replace(size=last.size * piece.size)
        else:
            joined.append(piece)
    return tuple(joined)
