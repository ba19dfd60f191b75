"""Layouts of the documented layers at any sizes: the axes are right, or they are unknown."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from nmjax.layouts import Axes, Unknown, layouts

# Layers, spelled as in an einsum, weight -> bias: i, j, k are inputs, o, p outputs, t, u, v taps,
# r, s positions that share no weights.
IN_OUT = {
    "dense": "io->o",
    "dense 1-2": "iop->op",
    "dense 2-1": "ijo->o",
    "dense 2-2": "ijop->op",
    "dense 3-2": "ijkop->op",
    "conv 1-D": "tio->o",
    "conv 2-D": "tuio->o",
    "conv 3-D": "tuvio->o",
    "channels first": "tuio->o11",
    "transposed 1-D": "toi->o",
    "transposed 2-D": "tuoi->o",
    "transposed, channels first": "tuoi->o11",
    "local 1-D": "sio->so",
    "local 2-D": "srio->sro",
}
OUT_IN = {
    "linear": "oi->o",
    "conv 1-D": "oit->o",
    "conv 2-D": "oitu->o",
    "conv 3-D": "oituv->o",
    "Equinox 1-D": "oit->o1",
    "Equinox 2-D": "oitu->o11",
    "transposed 1-D": "iot->o",
    "transposed 2-D": "iotu->o",
}
LETTERS = {"ijk": "reduction", "op": "output", "tuv": "taps"}


def stack(letters, axis):
    return letters[:axis] + "l" + letters[axis:]


def shape_of(letters, sizes):
    return tuple(1 if letter == "1" else sizes[letter] for letter in letters)


def truth(weight):
    roles = {role: [] for role in LETTERS.values()}
    for axis, letter in enumerate(weight):
        for letters, role in LETTERS.items():
            if letter in letters:
                roles[role].append(axis - len(weight))
    return Axes(*map(tuple, roles.values()))


def assert_right(found, weight, sizes):
    if isinstance(found, Unknown):
        return
    axes = truth(weight)
    inputs = np.prod([sizes[weight[axis]] for axis in axes.reduction])
    if isinstance(found, str):
        assert found == "one input per output"
        assert inputs == 1
        return

    # Which axes of size 1 count as inputs or outputs makes no difference.
    def long(span):
        return [axis for axis in span if sizes[weight[axis]] > 1]

    assert long(found.reduction) == long(axes.reduction)
    assert long(found.output) == long(axes.output)
    assert found.taps is None or long(found.taps) == long(axes.taps)


SIZES = st.fixed_dictionaries({letter: st.integers(1, 6) for letter in "ijkoptuvsrl"})
ROLES = st.sets(st.sampled_from(["query", "key", "value", "out"]), min_size=1)
NAMES = st.sampled_from(["layer", "query", "out", "proj", "up", "0"])


@pytest.mark.parametrize("stacked", [None, 0, 1])
@pytest.mark.parametrize("kind", IN_OUT)
@given(sizes=SIZES, with_bias=st.booleans(), leaf=st.sampled_from(["kernel", "w"]), name=NAMES)
@settings(max_examples=60, deadline=None)
def test_layers_of_flax_haiku_and_keras(kind, stacked, sizes, with_bias, leaf, name):
    weight, bias = IN_OUT[kind].split("->")
    if stacked is not None:
        weight, bias = stack(weight, stacked), stack(bias, stacked)
    shapes = {f"{name}/{leaf}": shape_of(weight, sizes)}
    if with_bias:
        shapes[f"{name}/{'b' if leaf == 'w' else 'bias'}"] = shape_of(bias, sizes)
    assert_right(layouts(shapes)[f"{name}/{leaf}"], weight, sizes)


@pytest.mark.parametrize("stacked", [None, 0])
@pytest.mark.parametrize("kind", OUT_IN)
@given(sizes=SIZES, with_bias=st.booleans(), name=NAMES)
@settings(max_examples=60, deadline=None)
def test_layers_of_pytorch_and_equinox(kind, stacked, sizes, with_bias, name):
    # A square transposed convolution with one tap, which makes no sense, is read as a convolution.
    assume(kind != "transposed 2-D" or sizes["t"] * sizes["u"] > 1 or sizes["i"] != sizes["o"])
    weight, bias = OUT_IN[kind].split("->")
    if stacked is not None:
        weight, bias = stack(weight, stacked), stack(bias, stacked)
    shapes = {f"{name}.weight": shape_of(weight, sizes), "norm.weight": (3,)}
    if with_bias:
        shapes[f"{name}.bias"] = shape_of(bias, sizes)
    assert_right(layouts(shapes)[f"{name}.weight"], weight, sizes)


@pytest.mark.parametrize("stacked", [None, 0, 1])
@given(sizes=SIZES, with_bias=st.booleans(), present=ROLES)
@settings(max_examples=200, deadline=None)
def test_attention(stacked, sizes, with_bias, present):
    roles = {"query": "iop->op", "key": "iop->op", "value": "iop->op", "out": "ijo->o"}
    roles = {role: letters for role, letters in roles.items() if role in present}
    sizes_out = {**sizes, "i": sizes["o"], "j": sizes["p"], "o": sizes["k"]}
    shapes, weights = {}, {}
    for role, letters in roles.items():
        own = sizes_out if role == "out" else sizes
        weight, bias = letters.split("->")
        if stacked is not None:
            weight, bias = stack(weight, stacked), stack(bias, stacked)
        weights[role] = weight, own
        shapes[f"{role}/kernel"] = shape_of(weight, own)
        if with_bias:
            shapes[f"{role}/bias"] = shape_of(bias, own)
    found = layouts(shapes)
    for role, (weight, own) in weights.items():
        assert_right(found[f"{role}/kernel"], weight, own)


@pytest.mark.parametrize("stacked", [None, 0, 1])
@pytest.mark.parametrize("kind", ["conv 1-D", "conv 2-D", "transposed 1-D", "transposed 2-D"])
@given(sizes=SIZES, with_bias=st.booleans(), roles=ROLES)
@settings(max_examples=60, deadline=None)
def test_convolutions_with_names_of_attention(kind, stacked, sizes, with_bias, roles):
    weight, bias = IN_OUT[kind].split("->")
    if stacked is not None:
        weight, bias = stack(weight, stacked), stack(bias, stacked)
    shapes = {}
    for role in roles:
        shapes[f"{role}/kernel"] = shape_of(weight, sizes)
        if with_bias:
            shapes[f"{role}/bias"] = shape_of(bias, sizes)
    for role in roles:
        assert_right(layouts(shapes)[f"{role}/kernel"], weight, sizes)


@given(
    sizes=SIZES,
    groups=st.integers(1, 4),
    with_bias=st.booleans(),
    taps=st.sampled_from(["t", "tu", "tuv"]),
    name=NAMES,
)
@settings(max_examples=300, deadline=None)
def test_transposed_convolutions_in_groups(sizes, groups, with_bias, taps, name):
    """PyTorch's weight is (in, out / groups, *taps); groups of inputs sum by themselves."""
    inputs = sizes["i"] * groups
    shape = (inputs, sizes["o"], *shape_of(taps, sizes))
    shapes = {f"{name}.weight": shape}
    if with_bias:
        shapes[f"{name}.bias"] = (sizes["o"] * groups,)
    found = layouts(shapes)[f"{name}.weight"]
    if groups == 1:
        assert_right(found, "io" + taps, {**sizes, "i": inputs})
    elif isinstance(found, str):
        assert sizes["i"] == 1
    else:
        assert isinstance(found, Unknown)


@given(sizes=SIZES, taps=st.sampled_from(["t", "tu"]), name=NAMES, with_bias=st.booleans())
@settings(max_examples=200, deadline=None)
def test_depthwise_convolutions_of_keras(sizes, taps, name, with_bias):
    shapes = {f"{name}/kernel": (*shape_of(taps, sizes), sizes["i"], sizes["o"])}
    if with_bias:
        shapes[f"{name}/bias"] = (sizes["i"] * sizes["o"],)
    found = layouts(shapes)[f"{name}/kernel"]
    assert isinstance(found, Unknown) or found == "one input per output"
