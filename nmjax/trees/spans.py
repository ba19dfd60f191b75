"""Spans of axes: views an array of any layout as a stack of matrices, and back.

A span is a tuple of negative axes in the order in which they are flattened; the last varies
fastest. Axes in no span are the stack: they come first and keep their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np

Span = tuple[int, ...]
Array = TypeVar("Array", jax.Array, np.ndarray)


def merge(x: Array, spans: Sequence[Span]) -> Array:
    """Flattens each span into one axis, after the stack. Works on JAX and NumPy arrays.

    >>> import jax.numpy as jnp
    >>> attention_out = jnp.zeros((5, 8, 64, 512))  # A stack of 5 kernels (heads, head, out).
    >>> merge(attention_out, [(-3, -2), (-1,)]).shape
    (5, 512, 512)
    """
    stack: list[int] = stack_axes(x.ndim, spans)
    merged: list[int] = [math.prod(x.shape[axis] for axis in span) for span in spans]
    moved: Array = x.transpose([*stack, *(axis + x.ndim for span in spans for axis in span)])
    return moved.reshape([*(x.shape[axis] for axis in stack), *merged])


def split(merged: Array, shape: Sequence[int], spans: Sequence[Span]) -> Array:
    """Undoes `merge`, given the original shape."""
    ndim: int = len(shape)
    order: list[int] = [*stack_axes(ndim, spans), *(axis + ndim for span in spans for axis in span)]
    moved: Array = merged.reshape([shape[axis] for axis in order])
    return moved.transpose(sorted(range(ndim), key=order.__getitem__))


def stack_axes(ndim: int, spans: Sequence[Span]) -> list[int]:
    """The axes in no span, as non-negative numbers."""
    named = {axis + ndim for span in spans for axis in span}
    return [axis for axis in range(ndim) if axis not in named]
