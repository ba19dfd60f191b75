"""The other arguments of a product: its activation, and how a convolution's window moves."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jax import lax

from nmjax.layouts.axes import Shape

Activation = Literal["relu"] | None
FusedActivation = Literal["relu", "gelu"] | None  # What cuSPARSELt adds to some products.
Padding = Literal["SAME", "VALID"] | int | Sequence[int | tuple[int, int]]


@dataclass(frozen=True)
class Window:
    """How a convolution's kernel moves, one entry for each spatial axis.

    Attributes:
      strides: output steps, in pixels of the input.
      padding: zeros put before and after.
      dilation: distance of the kernel's taps, in pixels of the input.
    """

    strides: Shape
    padding: tuple[tuple[int, int], ...]
    dilation: Shape

    def output(self, spatial: Shape, taps: Shape) -> Shape:
        """Sizes of the output for an input of these sizes."""
        return tuple(
            (size + sum(padding) - dilation * (tap - 1) - 1) // stride + 1
            for size, tap, stride, padding, dilation in zip(
                spatial, taps, self.strides, self.padding, self.dilation, strict=True
            )
        )

    def has_wide_gaps(self, spatial: Shape, taps: Shape) -> bool:
        """Whether a dilated kernel reaches over far more pixels than the image has."""
        reached = [
            size + (tap - 1) * dilation
            for size, tap, dilation in zip(spatial, taps, self.dilation, strict=True)
        ]
        return max(self.dilation) > 1 and math.prod(reached) > 4 * math.prod(spatial)


def as_window(
    spatial: Shape,
    taps: Shape,
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
) -> Window:
    """Reads the window that a user describes.

    Raises:
      TypeError: a number is not an integer.
      ValueError: not one entry for each spatial axis; a stride or dilation below 1; padding that
        is negative or unknown; a kernel larger than the padded image.
    """
    rank = len(spatial)
    strides = _integers("strides", strides, rank)
    dilation = _integers("dilation", dilation, rank)
    if min(*strides, *dilation) < 1:
        raise ValueError(f"strides {strides} and dilation {dilation} must be at least 1")
    pads: Sequence[Shape]
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID", "SAME_LOWER"):
            raise ValueError(f'padding must be "SAME", "VALID" or integers, got {padding!r}')
        # A dilated kernel is padded like a dense one of this size.
        reach = [(tap - 1) * step + 1 for tap, step in zip(taps, dilation, strict=True)]
        pads = lax.padtype_to_pads(spatial, reach, strides, padding.upper())
    else:
        sides = _entries("padding", padding, rank)
        pads = [_integers("the padding of an axis", side, 2) for side in sides]
    window = Window(strides, tuple((int(before), int(after)) for before, after in pads), dilation)
    if min(min(pad) for pad in window.padding) < 0:
        raise ValueError(f"padding {window.padding} must not be negative")
    if min(window.output(spatial, taps)) < 1:
        raise ValueError(
            f"a kernel of {taps} taps, dilation {dilation}, does not fit into an image of "
            f"{spatial} with padding {window.padding}"
        )
    return window


def _entries(name: str, given: Any, count: int) -> tuple[Any, ...]:
    entries = tuple(given) if isinstance(given, Sequence | np.ndarray) else (given,) * count
    if len(entries) != count:
        raise ValueError(f"{name} has {len(entries)} entries, expected {count}: {given!r}")
    return entries


def _integers(name: str, given: Any, count: int) -> Shape:
    entries = _entries(name, given, count)
    if not all(hasattr(entry, "__index__") for entry in entries):
        raise TypeError(f"{name} should be integers, got {given!r}")
    return tuple(map(operator.index, entries))
