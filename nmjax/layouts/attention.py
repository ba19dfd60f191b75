"""The four projections of attention, recognized by heads that agree.

A 1-D convolution has as many axes as a projection, and a 2-D one as many as a stack of projections.
"""

from __future__ import annotations

from nmjax.layouts.axes import Shape
from nmjax.layouts.names import Leaf
from nmjax.layouts.readings import DENSE, Reading
from nmjax.layouts.siblings import Siblings

_INS = ("query", "key", "value")
_OUTS = ("out", "attention_output")
_STACKS = ((), (0,), (1,), (0, 0))


def attention_projection(leaf: Leaf, siblings: Siblings) -> Reading | None:
    """The projection that a weight is in Flax's and Keras's attention, if its siblings agree.

    The heads of query, key, value and out must agree for one way to stack layers only.
    """
    *above, role = leaf.module or ("",)
    outs = [out for out in _OUTS if siblings.shape((*above, out), leaf.leaf)]
    if len(outs) != 1 or role not in (*_INS, outs[0]):
        return None
    modules = [(*above, name) for name in (*_INS, outs[0])]
    shapes = [siblings.shape(module, leaf.leaf) for module in modules]
    biases = [siblings.bias(Leaf(module, leaf.leaf)) for module in modules]
    fitting = [
        readings
        for stack in _STACKS
        if (readings := _projections(stack)) and _heads_agree(stack, shapes, readings, biases)
    ]
    # Four convolutions with filters of one size may look the same.
    if len(fitting) != 1 or (not any(biases) and shapes[0][:-2] == shapes[3][:-2]):
        return None
    return fitting[0][modules.index(leaf.module)]


def _projections(stack: tuple[int, ...]) -> list[Reading]:
    """How query, key, value, and out are stored in a stack of layers."""
    readings = [Reading(DENSE, "ioo", (1, 2))] * 3 + [Reading(DENSE, "iio", (2,))]
    for axis in stack:
        readings = [reading.stacked(axis) for reading in readings]
    return readings


def _heads_agree(
    stack: tuple[int, ...], shapes: list[Shape], readings: list[Reading], biases: list[Shape]
) -> bool:
    if any(len(shape) != 3 + len(stack) for shape in shapes):
        return False
    if not all(
        not bias or reading.fits(shape, bias)
        for reading, shape, bias in zip(readings, shapes, biases, strict=True)
    ):
        return False
    layers = {
        tuple(size for size, role in zip(shape, reading.roles, strict=True) if role == "s")
        for shape, reading in zip(shapes, readings, strict=True)
    }
    cores = [
        tuple(size for size, role in zip(shape, reading.roles, strict=True) if role != "s")
        for shape, reading in zip(shapes, readings, strict=True)
    ]
    (_, heads, size), (_, key_heads, key_size), (_, value_heads, value_size), out = cores
    return (
        len(layers) == 1
        and out[:2] == (heads, value_size)
        and (size, key_heads) == (key_size, value_heads)
        and key_heads > 0
        and heads % key_heads == 0
    )
