"""Judges which layer a weight belongs to, by its shape, its bias, and the layer's name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from nmjax.layouts.axes import Shape, Unknown
from nmjax.layouts.names import Leaf, is_called_conv, is_named_by_flax
from nmjax.layouts.readings import (
    CONV,
    DENSE,
    DEPTHWISE,
    ONE_INPUT,
    TRANSPOSED,
    Outcome,
    Reading,
    decide,
    in_out_readings,
    out_in_readings,
)
from nmjax.layouts.siblings import Siblings


class Judgment(NamedTuple):
    """What a leaf is.

    Attributes:
      outcome: axes, reason to stay dense, or `Unknown`.
      corroborated: whether a bias, a class, or a name says which axis is the input.
      contradicts: whether the bias fits no documented layer.
      by_name: whether only a name that a user chose, or a single tap, says that a convolution is
        not transposed.
      is_transposed: whether the bias says that a convolution is transposed.
    """

    outcome: Outcome
    corroborated: bool = False
    contradicts: bool = False
    by_name: bool = False
    is_transposed: bool = False


def judge_in_out(
    leaf: Leaf, shape: Shape, siblings: Siblings, projection: Reading | None
) -> Judgment:
    """Judges a leaf `kernel` or `w`; `projection` is what it is in attention, if anything."""
    bias, layer = siblings.bias(leaf), leaf.own_name
    if "einsum" in layer:
        return Judgment(Unknown("an einsum may sum over any axis"))
    general = layer.startswith(("densegeneral", "lineargeneral"))
    readings = in_out_readings(
        len(shape), many_inputs=general or "dense" in layer or "linear" in layer
    )
    if general:
        readings = [reading for reading in readings if reading.layer == DENSE]
    if projection is not None:
        return Judgment(projection.outcome(shape), corroborated=True)
    if bias:
        return _by_bias(readings, leaf, shape, bias)
    if len(shape) == 2:
        if leaf.leaf == "w" and "embed" in layer:
            return Judgment(Unknown("could be a look-up table or a matrix"))
        return Judgment(decide(readings, shape))
    if is_called_conv(leaf):
        return _in_out_conv(shape)._replace(by_name=not is_named_by_flax(leaf))
    if "depthwise" in layer and 1 in shape[-2:]:
        return Judgment(ONE_INPUT, corroborated=True)
    return Judgment(_no_bias(readings))


def judge_out_in(leaf: Leaf, shape: Shape, siblings: Siblings, layer: str | None) -> Judgment:
    """Judges a leaf `weight`; `layer` is its class in `equinox.nn` if that is known."""
    readings = out_in_readings(len(shape))
    if layer is not None:
        readings = [reading for reading in readings if _is_of_class(reading, layer)]
    if len(shape) > 2 and any("expert" in name.lower() for name in leaf.module):
        return Judgment(Unknown("experts may be stored as (in, out) or as (out, in)"))
    bias, norm = siblings.bias(leaf), siblings.next_norm(leaf)
    if not bias and len(shape) > 2 and any(reading.fits(shape, norm) for reading in readings):
        bias = norm  # It has as many channels as the outputs that it normalizes.
    if bias:
        judgment = _by_bias(readings, leaf, shape, bias)
        if isinstance(judgment.outcome, Unknown) and _fits_conv_of_one_tap(shape, bias):
            conv = Reading(CONV, "oi" + "t" * (len(shape) - 2), (0,))
            return Judgment(conv.outcome(shape), corroborated=True, by_name=True)
        return judgment._replace(corroborated=judgment.corroborated or layer is not None)
    if len(shape) == 2:
        return Judgment(decide(readings, shape), corroborated=layer is not None)
    unstacked = [r for r in readings if r.layer == CONV and "s" not in r.roles]
    # A class like Conv2d gives the number of taps; else, leaves with one axis show that nothing is
    # stacked.
    is_conv = layer is not None or is_called_conv(leaf)
    counted = layer is not None and layer[-2:-1].isdigit()
    if unstacked and is_conv and (counted or siblings.is_beside_a_vector(leaf)):
        return Judgment(decide(unstacked, shape), corroborated=True, by_name=layer is None)
    return Judgment(_no_bias(readings))


def _is_of_class(reading: Reading, layer: str) -> bool:
    """Whether a layer of this class in `equinox.nn` can be read so."""
    if not layer.startswith("Conv"):
        return reading.layer == DENSE
    # Equinox stores transposed convolutions like others. The classes are Conv, Conv1d, ...
    taps = layer[-2:-1]
    return reading.layer == CONV and (not taps.isdigit() or reading.roles.count("t") == int(taps))


def _by_bias(readings: list[Reading], leaf: Leaf, shape: Shape, bias: Shape) -> Judgment:
    fitting = [reading for reading in readings if reading.fits(shape, bias)]
    if not fitting:
        return Judgment(Unknown(f"a bias of shape {bias} fits no known layer"), contradicts=True)
    kinds: tuple[str, ...] = ()
    if is_called_conv(leaf):
        kinds = (CONV,)
    elif "depthwise" in leaf.own_name:
        kinds = (CONV, TRANSPOSED, DEPTHWISE)
    named = [reading for reading in fitting if reading.layer in kinds]
    transposed = [reading for reading in fitting if reading.layer == TRANSPOSED]
    fitting = named or fitting
    return Judgment(
        decide(fitting, shape),
        corroborated=bool(named) or all(reading.is_corroborated(shape) for reading in fitting),
        by_name=bool(named and transposed) and not is_named_by_flax(leaf),
        is_transposed=len(transposed) == len(fitting) and not named,
    )


def _fits_conv_of_one_tap(shape: Shape, bias: Shape) -> bool:
    """Whether a weight looks like PyTorch's 1x1 convolution.

    Nobody transposes them: transposed convolutions enlarge images, for which one tap is too few.
    """
    return len(shape) > 3 and set(shape[2:]) == {1} and bias == shape[:1]


def _in_out_conv(shape: Shape) -> Judgment:
    """A convolution without a bias, known by its name."""
    if shape[-1] == 1:
        return Judgment(Unknown("could be a convolution with one output, or a depthwise one"))
    conv = Reading(CONV, "t" * (len(shape) - 2) + "io", ())
    # Four axes are taken for a 2-D convolution; three or five may include a stack of layers.
    stacked = [] if len(shape) == 4 else [conv._replace(roles="s" + conv.roles[1:])]
    return Judgment(decide([conv, *stacked], shape), corroborated=True)


def _no_bias(readings: Iterable[Reading]) -> Unknown:
    by_reduction: dict[tuple[int, ...], str] = {}
    for reading in readings:
        if "s" not in reading.roles:
            by_reduction.setdefault(reading.axes().reduction, str(reading))
    examples = [*list(by_reduction.values())[:4], "a stack of layers"]
    return Unknown(f"ambiguous without a bias; could be {' or '.join(examples)}")
