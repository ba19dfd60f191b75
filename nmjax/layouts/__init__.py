"""Layouts: which axes of a weight its layer sums over, where names and shapes settle it."""

from nmjax.layouts.axes import Axes, GivenAxes, Shape, Unknown, given_axes, size_along
from nmjax.layouts.optimizer_states import optimizer_leaves
from nmjax.layouts.whole_trees import layouts

__all__ = [
    "Axes",
    "GivenAxes",
    "Shape",
    "Unknown",
    "given_axes",
    "layouts",
    "optimizer_leaves",
    "size_along",
]
