"""Which axes of a leaf become which axes of a PyTorch tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nmjax.layouts import Axes, GivenAxes, Shape, Unknown, given_axes, layouts, size_along
from nmjax.patterns.pattern import LeafPlan
from nmjax.trees.path_rules import PathRules, as_rules, check_rules, first_match
from nmjax.trees.spans import Span, merge, split, stack_axes

# Flax's own name of a transposed convolution.
_FLAX_TRANSPOSED = re.compile(r"(^|/)ConvTranspose_\d+/kernel$")
# Names of layers that are or may be transposed convolutions. A layer without a name may be, too.
_MAYBE_TRANSPOSED = re.compile(r"(^[^/]*|(trans|deconv|(^|[/_\d])up)[^/]*/[^/]*)$", re.IGNORECASE)


class Conversion(NamedTuple):
    """How a leaf of one shape becomes a PyTorch tensor.

    Attributes:
      spans: for each axis in PyTorch, the axes of the leaf that it combines.
      flipped: axes in PyTorch along which the order is reversed.
    """

    spans: list[Span]
    flipped: Span = ()

    def torch_shape(self, shape: Shape) -> Shape:
        """The shape in PyTorch of a leaf of this shape."""
        return tuple(size_along(shape, span) for span in self.spans)

    def to_torch(self, leaf: np.ndarray) -> np.ndarray:
        """Converts a leaf to a tensor."""
        return np.flip(merge(leaf, self.spans), self.flipped)

    def from_torch(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """Converts a tensor to a leaf."""
        return split(np.flip(tensor, self.flipped), shape, self.spans)


@dataclass(frozen=True)
class Layouts:
    """What is known about the layout of the leaves, besides their names and shapes.

    Attributes:
      axes: path rule -> axes of the leaves that match.
      plan: leaf name -> plan of the leaf.
      transposed: path rules of the kernels of transposed convolutions; None if unknown.
      transpose_kernel: path rules of those that Flax computes with `transpose_kernel=True`.
    """

    axes: Mapping[str, GivenAxes] = field(default_factory=dict)
    plan: Mapping[str, LeafPlan] = field(default_factory=dict)
    transposed: PathRules | None = None
    transpose_kernel: PathRules = ()

    def conversions(
        self, shapes: Mapping[str, Shape], names: Iterable[str] | None = None
    ) -> dict[str, Conversion]:
        """Leaf name -> conversion.

        Args:
          shapes: shapes of all leaves by name.
          names: leaves to convert; by default all.

        Raises:
          ValueError: the layout of a kernel is unknown, or PyTorch has none for it; a path rule
            matches no leaf. The message lists all such leaves.
        """
        unflipped = as_rules(self.transpose_kernel)
        transposed = (*as_rules(self.transposed or ()), *unflipped)
        kernels = [name for name in shapes if _is_kernel(name, shapes)]
        check_rules(self.axes, shapes)
        check_rules(transposed, kernels)
        known = layouts(shapes)
        found: dict[str, Conversion] = {}
        complaints = []
        for name in shapes if names is None else names:
            try:
                if name in kernels and first_match(transposed, name) is not None:
                    flip = first_match(unflipped, name) is None
                    found[name] = self._transposed(name, shapes, flip)
                elif name in kernels and self.transposed is None and _outputs_shown(name, shapes):
                    flip = _outputs_shown(name, shapes) == -1
                    found[name] = self._transposed(name, shapes, flip)
                else:
                    found[name] = self._plain(name, shapes, known[name])
            except ValueError as error:
                complaints.append(f"  {name} of shape {shapes[name]}: {error}")
        if complaints:
            raise ValueError(
                "these leaves cannot be converted:\n"
                + "\n".join(complaints)
                + "\nIn transposed=, list path rules of all transposed convolutions, or pass () if "
                "there are none. Pass unknown axes in axes= or in plan=. Split stacks into layers."
            )
        return found

    def _plain(
        self, name: str, shapes: Mapping[str, Shape], known: Axes | str | Unknown
    ) -> Conversion:
        shape, leaf = shapes[name], name.rpartition("/")[-1]
        every = tuple(range(-len(shape), 0))
        given = first_match(self.axes, name) is not None
        if leaf == "bias" and every and not given:
            return Conversion([every])
        is_unclear = self.transposed is None and _MAYBE_TRANSPOSED.search(name)
        if (leaf not in ("kernel", "w") or len(shape) < 2) and not given:
            if is_unclear and _may_be_of_equinox(name, shapes):
                raise ValueError(
                    "may be a transposed convolution of Equinox, which PyTorch stores differently; "
                    "if it is already in PyTorch's order, pass transposed=()"
                )
            return Conversion([(axis,) for axis in every])
        axes = self._given(name, shape) or _certain(known, shape)
        # PyTorch's order: outputs, inputs, spatial axes. Heads and head size become one axis.
        conversion = _conversion(shape, axes.output, axes.reduction, axes.taps)
        # Other names count: where inputs and outputs differ, PyTorch would refuse the shape of a
        # transposed convolution, and where they do not, the axes of an unclear name are unknown.
        # Only transposed convolutions have their inputs last.
        if axes.taps and (is_unclear or (axes.reduction == (-1,) and not given)):
            raise ValueError("may be a transposed convolution, which PyTorch stores differently")
        return conversion

    def _transposed(self, name: str, shapes: Mapping[str, Shape], flip: bool) -> Conversion:
        shape, leaf = shapes[name], name.rpartition("/")[-1]
        axes = _transposed_axes(leaf, len(shape), flip)
        given = self._given(name, shape) or axes
        bias = shapes.get(name.removesuffix(leaf) + ("b" if leaf == "w" else "bias"))
        bias_fits = bias is None or np.prod(bias) == size_along(shape, axes.output)
        if given.reduction != axes.reduction or not bias_fits:
            raise ValueError(
                f"a transposed convolution with inputs on axis {axes.reduction[0]} and outputs on "
                f"axis {axes.output[0]} does not fit its {'axes' if bias_fits else 'bias'}; list "
                "it in transpose_kernel= if, and only if, the layer has this setting"
            )
        conversion = _conversion(shape, axes.reduction, axes.output, axes.taps)
        return conversion._replace(flipped=tuple(range(2, len(conversion.spans))) if flip else ())

    def _given(self, name: str, shape: Shape) -> Axes | None:
        """The axes that the user or the plan gives, or None."""
        rule = first_match(self.axes, name)
        if rule is not None:
            try:
                return given_axes(self.axes[rule], len(shape))
            except (TypeError, ValueError) as error:
                raise type(error)(
                    f"axes={{{rule!r}: {self.axes[rule]}}} does not fit {name}: {error}"
                ) from error
        planned = self.plan.get(name)
        return planned.axes if planned is not None and _is_whole(planned, len(shape)) else None


def _is_whole(planned: LeafPlan, ndim: int) -> bool:
    """Whether a plan distinguishes inputs, outputs and taps, as a layer does."""
    # Groups may run along inputs and taps together, which is not their order in the kernel. Where
    # a user gives only reduction axes, the others count as outputs. Axes in no role may be taps.
    in_order = list(planned.reduction_axes) == sorted(planned.reduction_axes)
    is_found = planned.source in ("program", "known layer")
    no_stack = not stack_axes(ndim, (planned.reduction_axes, planned.output_axes, planned.tap_axes))
    return in_order and no_stack and (is_found or len(planned.output_axes) == 1)


def _certain(known: Axes | str | Unknown, shape: Shape) -> Axes:
    if isinstance(known, Axes):
        return known
    if isinstance(known, str) and shape[-2] == 1:  # Depthwise; stored like other convolutions.
        return Axes((-2,), (-1,), tuple(range(-len(shape), -2)))
    raise ValueError(f"unknown axes: {known.reason if isinstance(known, Unknown) else known}")


def _is_kernel(name: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether a leaf can be the kernel of a transposed convolution."""
    return name.rpartition("/")[-1] in ("kernel", "w", "weight") and len(shapes[name]) > 2


def _outputs_shown(name: str, shapes: Mapping[str, Shape]) -> int | None:
    """The axis of the outputs in a transposed convolution of Flax, if its name and bias show it."""
    bias = shapes.get(name.removesuffix("kernel") + "bias")
    *_, first, second = shapes[name]
    if not _FLAX_TRANSPOSED.search(name) or bias not in ((first,), (second,)) or first == second:
        return None
    return -1 if bias == (second,) else -2


def _may_be_of_equinox(name: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether a weight may be a convolution's in Equinox, whose bias has an axis for each tap."""
    is_weight = name.rpartition("/")[-1] == "weight" and len(shapes[name]) > 2
    bias = shapes.get(name.removesuffix("weight") + "bias")
    return is_weight and (bias is None or len(bias) > 1)


def _conversion(shape: Shape, first: Span, second: Span, taps: Span | None) -> Conversion:
    if taps is None:
        raise ValueError(
            "may be a stack of layers, which PyTorch has no layout for; if not, pass axes= with "
            "nmjax.Axes(reduction, output, taps)"
        )
    spans = [first, second, *((tap,) for tap in taps)]
    if stack_axes(len(shape), spans):
        raise ValueError("is a stack of layers, which PyTorch has no layout for")
    return Conversion(spans)


def _transposed_axes(leaf: str, ndim: int, flip: bool) -> Axes:
    """The axes of a transposed convolution's kernel, by the library whose name the leaf has."""
    if leaf == "weight":  # Equinox.
        return Axes((1 - ndim,), (-ndim,), tuple(range(2 - ndim, 0)))
    taps = tuple(range(-ndim, -2))
    if leaf == "kernel" and flip:  # Flax.
        return Axes((-2,), (-1,), taps)
    return Axes((-1,), (-2,), taps)  # Haiku, and Flax with `transpose_kernel=True`.
