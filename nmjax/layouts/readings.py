"""Readings: every documented layer that a weight's shape and its bias allow.

A reading gives each axis of the weight a role. The layers, by the name of their weight:

| leaf | layer | shape | bias |
|---|---|---|---|
| `kernel`, `w` | dense | (*in, *out) | (*out) |
| `kernel`, `w` | convolution | (*taps, in, out) | (out) |
| `kernel`, `w` | transposed: Haiku, Keras; Flax on request | (*taps, out, in) | (out) |
| `kernel` | Flax: weights not shared | (*positions, in, out) | (*positions, out) |
| `kernel` | Keras: depthwise | (*taps, in, multiple) | (in * multiple) |
| `weight` | linear | (out, in) | (out) |
| `weight` | convolution; Equinox: transposed, too | (out, in, *taps) | (out) |
| `weight` | PyTorch: transposed | (in, out, *taps) | (out) |
| `weight` | PyTorch: bilinear | (out, in1, in2) | (out) |

`kernel` belongs to Flax and Keras, `w` to Haiku, `weight` to PyTorch and Equinox.
Each may be a stack of layers: `nn.scan` and `vmap` put a new axis first or second, in the bias too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nmjax.layouts.axes import Axes, Shape, Unknown, size_along

ONE_INPUT = "one input per output"
Outcome = Axes | str | Unknown

DENSE = "a dense layer"
CONV = "a convolution"
TRANSPOSED = "a transposed convolution"
GROUPED_TRANSPOSED = "a grouped transposed convolution"
DEPTHWISE = "a depthwise convolution"
LOCAL = "a convolution without shared weights"
BILINEAR = "a bilinear layer"

_WORDS = {"i": "in", "o": "out", "t": "tap", "s": "stack", "x": "in"}


class Reading(NamedTuple):
    """A layer that a weight may belong to.

    Attributes:
      layer: what the layer is.
      roles: a letter for each axis of the weight: i(n), o(ut), t(ap), s(tack), or x for an input
        axis that no single product sums over.
      bias: axes of the weight that the bias runs along, in the bias's order.
      trailing: whether the bias may have an axis of size 1 for each tap.
    """

    layer: str
    roles: str
    bias: tuple[int, ...]
    trailing: bool = False

    def __str__(self) -> str:
        return f"{self.layer} ({', '.join(_WORDS[role] for role in self.roles)})"

    def stacked(self, axis: int) -> Reading:
        """This layer several times, stacked along a new axis."""
        roles = self.roles[:axis] + "s" + self.roles[axis:]
        bias = [a + (a >= axis) for a in self.bias]
        bias.insert(axis, axis)
        return self._replace(roles=roles, bias=tuple(bias))

    def fits(self, shape: Shape, bias: Shape) -> bool:
        """Whether the layer with a weight of this shape has a bias of this shape."""
        return bias in self._biases(shape)

    def outcome(self, shape: Shape) -> Outcome:
        """The axes; or why a weight of this shape stays dense, or why it has no axes."""
        if self.layer == DEPTHWISE:
            return ONE_INPUT
        if self.layer in (BILINEAR, GROUPED_TRANSPOSED):
            return Unknown(f"this looks like {self}")
        axes = self.axes()
        return ONE_INPUT if size_along(shape, axes.reduction) == 1 else axes

    def axes(self) -> Axes:
        """The roles as axes."""
        return Axes(*(self._span(role) for role in "iot"))

    def is_corroborated(self, shape: Shape) -> bool:
        """Whether a bias that fits does not also fit the layer with inputs and outputs swapped."""
        inputs, outputs = (tuple(shape[axis] for axis in self._span(role)) for role in "io")
        return inputs != outputs

    def _span(self, role: str) -> tuple[int, ...]:
        ndim = len(self.roles)
        return tuple(axis - ndim for axis, letter in enumerate(self.roles) if letter == role)

    def _biases(self, shape: Shape) -> Iterator[Shape]:
        inputs = size_along(shape, self._span("i"))
        if self.layer == DEPTHWISE:
            yield self._bias(shape, inputs)
        elif self.layer == GROUPED_TRANSPOSED:
            for groups in range(2, inputs + 1):
                if inputs % groups == 0:
                    yield self._bias(shape, groups)
        else:
            sizes = self._bias(shape, 1)
            yield sizes
            if self.trailing:
                yield sizes + (1,) * self.roles.count("t")
            if self.roles == "io":  # Keras's GRU has one bias for the input and one for the state.
                yield (2, *sizes)

    def _bias(self, shape: Shape, times: int) -> Shape:
        """The shape of the bias if the layer has `times` as many outputs as the output axis."""
        return tuple(shape[axis] * (times if self.roles[axis] == "o" else 1) for axis in self.bias)


def in_out_readings(ndim: int, *, many_inputs: bool) -> list[Reading]:
    """The layers that call their weight `kernel` or `w`.

    Args:
      ndim: number of axes of the weight.
      many_inputs: whether to consider dense layers that sum over three or more axes. They look like
        convolutions.
    """
    cores = [
        core
        for size in range(2, ndim + 1)
        for core in _in_out_cores(size)
        if many_inputs or core.roles.count("i") < 3 or core.roles.count("o") > 1
    ]
    return _with_stacks(cores, ndim, ((), (0,), (1,), (0, 0)))


def out_in_readings(ndim: int) -> list[Reading]:
    """The layers that call their weight `weight`."""
    cores = [core for size in range(2, ndim + 1) for core in _out_in_cores(size)]
    return _with_stacks(cores, ndim, ((), (0,), (0, 0)))


def decide(readings: Iterable[Reading], shape: Shape) -> Outcome:
    """What all readings agree on; `Unknown` says what they could be."""
    outcomes = {reading.outcome(shape): reading for reading in readings}
    found = list(outcomes)
    if len(found) == 1:
        return found[0]
    first = found[0]
    if isinstance(first, Axes) and all(
        isinstance(outcome, Axes) and outcome[:2] == first[:2] for outcome in found
    ):
        return first._replace(taps=None)
    return Unknown("could be " + " or ".join(map(str, outcomes.values())))


def _in_out_cores(ndim: int) -> list[Reading]:
    last, taps = ndim - 1, "t" * (ndim - 2)
    dense = [
        Reading(DENSE, "i" * inputs + "o" * (ndim - inputs), tuple(range(inputs, ndim)))
        for inputs in range(1, ndim)
    ]
    if ndim == 2:
        return dense
    positions = tuple(range(ndim - 2))
    return [
        *dense,
        Reading(CONV, taps + "io", (last,), trailing=True),
        Reading(TRANSPOSED, taps + "oi", (last - 1,), trailing=True),
        Reading(LOCAL, "s" * (ndim - 2) + "io", (*positions, last)),
        Reading(DEPTHWISE, taps + "io", (last,)),
    ]


def _out_in_cores(ndim: int) -> list[Reading]:
    taps = "t" * (ndim - 2)
    if ndim == 2:
        return [Reading(DENSE, "oi", (0,))]
    bilinear = [Reading(BILINEAR, "oxx", (0,))] if ndim == 3 else []
    return [
        Reading(CONV, "oi" + taps, (0,), trailing=True),
        Reading(TRANSPOSED, "io" + taps, (1,)),
        Reading(GROUPED_TRANSPOSED, "io" + taps, (1,)),
        *bilinear,
    ]


def _with_stacks(
    cores: list[Reading], ndim: int, stacks: tuple[tuple[int, ...], ...]
) -> list[Reading]:
    readings = []
    for core in cores:
        for stack in stacks:
            if len(core.roles) + len(stack) == ndim:
                reading = core
                for axis in stack:
                    reading = reading.stacked(axis)
                readings.append(reading)
    return readings
