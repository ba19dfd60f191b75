"""Whether neighbors along an axis of a weight stay neighbors while a program slices and moves it.

Groups and blocks are consecutive weights. A product sees them only if the program keeps each of
them together and in its place between the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class Order(NamedTuple):
    """What a program has done to the order of the entries along one axis of a weight.

    Attributes:
      aligned: each stretch of this many entries, counted from the start of the axis, stays together
        and starts at a multiple of this number; 0 if the axis is as it was.
      start: the first entry of a slice; None if the entries are in another order, or unknown.
      why: the operation that lowered `aligned`.
    """

    aligned: int = 0
    start: int | None = 0
    why: str = ""

    def cut(self, aligned: int, start: int | None, why: str) -> Order:
        """The order after an operation that keeps stretches of `aligned` entries."""
        after = math.gcd(self.aligned, aligned)
        return Order(
            after,
            None if self.start is None or start is None else self.start + start,
            self.why if after == self.aligned else why,
        )


def together(orders: Iterable[Order]) -> Order:
    """The order of several parts of an axis, or of one of them."""
    first, *others = orders
    for other in others:
        start = first.start if first.start == other.start else None
        first = first.cut(other.aligned, 0, other.why)._replace(start=start)
    return first
