"""Layouts: which axes of a weight its layer sums over, where names and shapes settle it."""

from nmjax.layouts.axes import Axes, GivenAxes, Shape, Unknown, given_axes, size_along
from nmjax.layouts.whole_trees import layout, layouts

__all__ = [
    "Axes",
    "GivenAxes",
    "Shape",
    "Unknown",
    "given_axes",
    "layout",
    "layouts",
    "size_along",
]
