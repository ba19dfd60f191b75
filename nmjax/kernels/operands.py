"""What goes into a kernel: a packed weight as one matrix for each tap, and how a window moves.

Packed arrays have the same layout whatever axes the weight had, so every kernel sees one form:
(*taps, inputs, outputs). Sizes that may be a shard's are read off the arrays.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.layouts import Shape
from nmjax.packed.blocks import PackedBlocks
from nmjax.packed.nm import PackedNM
from nmjax.patterns import NM
from nmjax.plans import LeafPlan

Packed = PackedNM | PackedBlocks
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


def as_window(
    spatial: Shape,
    taps: Shape,
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
) -> Window:
    """The window that a user describes.

    Raises:
      TypeError: a number is no integer.
      ValueError: not one entry for each spatial axis; a stride or dilation below 1; padding that
        is negative or unknown; a kernel that reaches beyond the padded image.
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


def outputs_of(packed: Packed) -> int:
    """How many outputs the arrays hold: within `jax.shard_map`, those of the shard."""
    if isinstance(packed, PackedNM):
        return packed.values.shape[-1]
    n = packed.leaf_plan.pattern.n
    if packed.row_pointers is not None:
        return (packed.row_pointers.shape[-1] - 1) * n
    return packed.indices.shape[-2] * n


def inputs_of(packed: Packed) -> int:
    """How many inputs a tap has."""
    pattern = packed.leaf_plan.pattern
    if isinstance(pattern, NM):
        return packed.values.shape[-3] * pattern.m
    return packed.leaf_plan.inputs


def taps_of(packed: Packed) -> Shape:
    """Sizes of the taps' axes; for N:M of which no taps are known, all axes of the stack."""
    plan = packed.leaf_plan
    if plan.pattern.taps == "apart" and not plan.tap_axes:
        return packed.values.shape[:-3]
    return tuple(plan.shape[axis] for axis in plan.tap_axes)


def stack_of(packed: Packed) -> Shape:
    """Sizes of the axes in front of one weight; for N:M of which no taps are known, none."""
    if isinstance(packed, PackedNM):
        stack = packed.values.shape[:-3]
        return stack[: len(stack) - len(taps_of(packed))]
    return packed.indices.shape[: -2 if packed.row_pointers is None else -1]


def one_layer(packed: Packed) -> Packed:
    """The first weight of a stack; the weight itself where it is none.

    Axes in front of an N:M weight are taken for a stack if its plan does not call them taps.
    """
    plan = packed.leaf_plan
    unknown = plan.pattern.taps == "apart" and not plan.tap_axes
    for _ in taps_of(packed) if unknown else stack_of(packed):
        packed = jax.tree.map(lambda array: array[0], packed)
    return packed


def kernel_taps(packed: Packed) -> Shape:
    """Sizes of a convolution kernel's spatial axes, also where its taps count as inputs."""
    pattern = packed.leaf_plan.pattern
    return reduction_shape(packed)[1:] if pattern.taps == "with inputs" else taps_of(packed)


def as_matrices(packed: Packed) -> Packed:
    """The same arrays as the weight (*taps, inputs, outputs) of the sizes that they hold."""
    plan = packed.leaf_plan
    taps = taps_of(packed)
    tap_axes = tuple(range(-2 - len(taps), -2)) if isinstance(packed, PackedBlocks) else ()
    shape = (*taps, inputs_of(packed), outputs_of(packed))
    return dataclasses.replace(
        packed, leaf_plan=LeafPlan(plan.pattern, (-2,), (-1,), shape, tap_axes)
    )


def output_shape(packed: Packed) -> Shape:
    """The outputs' axes; where the arrays are a shard of them, the first axis is the cut one."""
    plan = packed.leaf_plan
    full = tuple(plan.shape[axis] for axis in plan.output_axes)
    return (outputs_of(packed) // math.prod(full[1:]), *full[1:])


def reduction_shape(packed: Packed) -> Shape:
    """The inputs' axes; where the arrays are a shard of them, the first axis is the cut one."""
    plan = packed.leaf_plan
    full = tuple(plan.shape[axis] for axis in plan.reduction_axes)
    return (inputs_of(packed) // math.prod(full[1:]), *full[1:])


def result_dtype(x: jax.Array, packed: Packed) -> np.dtype:
    """Dtype of the product: what JAX promotes the operands to."""
    return jnp.promote_types(x.dtype, packed.dtype)
