"""The projections of attention, recognized by heads that agree.

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

    The heads of out and those of query, key, and value, as far as they are there, must agree for
    one way to stack layers only.
    """
    *above, role = leaf.module or ("",)
    outs = [out for out in _OUTS if siblings.shape((*above, out), leaf.leaf)]
    ins = [name for name in _INS if siblings.shape((*above, name), leaf.leaf)]
    if not ins or len(outs) != 1 or role not in (*_INS, outs[0]):
        return None
    modules = [(*above, name) for name in (*ins, outs[0])]
    shapes = [siblings.shape(module, leaf.leaf) for module in modules]
    biases = [siblings.bias(Leaf(module, leaf.leaf)) for module in modules]
    fitting = [
        readings
        for stack in _STACKS
        if (readings := _projections(len(ins), stack))
        and _heads_agree(ins, stack, shapes, readings, biases)
    ]
    # Convolutions with filters of one size may look the same.
    if len(fitting) != 1 or (not any(biases) and shapes[0][:-2] == shapes[-1][:-2]):
        return None
    return fitting[0][modules.index(leaf.module)]


def _projections(ins: int, stack: tuple[int, ...]) -> list[Reading]:
    """How projections to heads, and the one back, are stored in a stack of layers."""
    readings = [Reading(DENSE, "ioo", (1, 2))] * ins + [Reading(DENSE, "iio", (2,))]
    for axis in stack:
        readings = [reading.stacked(axis) for reading in readings]
    return readings


def _heads_agree(
    names: list[str],
    stack: tuple[int, ...],
    shapes: list[Shape],
    readings: list[Reading],
    biases: list[Shape],
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
    *ins, (out_heads, out_size, _) = cores
    # Any projection may be missing here. Keys and values may have fewer heads than queries, but
    # only queries can show it.
    found = dict(zip(names, ins, strict=True))
    query, key, value = (found.get(name) for name in _INS)
    heads = {core[1] for core in (key, value) if core}
    sizes = {core[2] for core in (query, key) if core}
    return (
        len(layers) == 1
        and len(heads) < 2
        and len(sizes) < 2
        and all(count > 0 and out_heads % count == 0 for count in heads)
        and (query[1] == out_heads if query else heads == {out_heads})
        and (value or ins[0])[2] == out_size
    )
