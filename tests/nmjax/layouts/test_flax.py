"""Layouts of Flax's layers, judged by what the layers compute.

Whatever the layer: the axes found are those that its derivative shows, or they are unknown.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nmjax.layouts import Axes, Unknown, layouts
from nmjax.trees.leaves import named_leaves
from tests.nmjax.oracle import connections, disagreement

RANDOM = np.random.default_rng(0)
KEY = jax.random.key(0)


def normal(shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def shapes_of(tree):
    return {name: tuple(getattr(leaf, "shape", ())) for name, leaf in named_leaves(tree).items()}


def conv(taps, inputs, outputs, **options):
    x = (*taps, inputs)
    return lambda: nn.Conv(outputs, taps, padding="VALID", **options), x


def transposed(taps, inputs, outputs, **options):
    x = (1,) * len(taps) + (inputs,)
    return lambda: nn.ConvTranspose(outputs, taps, padding="VALID", **options), x


def dense(inputs, outputs):
    return lambda: nn.DenseGeneral(outputs, axis=tuple(range(-len(inputs), 0))), inputs


# Layer, shape of its input, groups, and where the axes are certain: with a bias ("b"), without one
# ("-"), and both in a layer with the name that linen gives it ("B", "_").
LINEN = {
    "Dense": (lambda: nn.Dense(5), (6,), 1, "b-B_"),
    "square Dense": (lambda: nn.Dense(6), (6,), 1, "b-B_"),
    "Dense of one input": (lambda: nn.Dense(6), (1,), 1, "b-B_"),
    "DenseGeneral 1-2": (*dense((6,), (2, 4)), 1, "bB"),
    "DenseGeneral 2-1": (*dense((2, 4), (6,)), 1, "B"),
    "DenseGeneral 2-2": (*dense((2, 4), (3, 5)), 1, "bB"),
    "DenseGeneral 1-3": (*dense((4,), (2, 3, 5)), 1, "bB"),
    "DenseGeneral 3-1": (*dense((2, 3, 4), (5,)), 1, "B"),
    "DenseGeneral of equal axes": (*dense((4,), (4, 4)), 1, ""),
    "Conv 1-D": (*conv((3,), 4, 5), 1, "B_"),
    "Conv 2-D": (*conv((3, 2), 4, 5), 1, "bB_"),
    "Conv 3-D": (*conv((2, 3, 2), 4, 5), 1, "bB_"),
    "square Conv": (*conv((3, 3), 4, 4), 1, "B_"),
    "Conv of one input": (*conv((3, 3), 1, 4), 1, "bB_"),
    "Conv of one output": (*conv((3, 3), 4, 1), 1, "bB"),
    "Conv in groups": (*conv((3, 2), 8, 6, feature_group_count=2), 2, "bB_"),
    "depthwise Conv": (*conv((3, 2), 6, 6, feature_group_count=6), 6, "bB_"),
    "ConvTranspose": (*transposed((3, 2), 4, 5), 1, "bB"),
    "square ConvTranspose": (*transposed((3, 2), 4, 4), 1, ""),
    "flipped": (*transposed((3, 2), 4, 5, transpose_kernel=True), 1, "bB"),
    "flipped 1-D": (*transposed((3,), 4, 5, transpose_kernel=True), 1, "bB"),
    "square flipped": (*transposed((3, 2), 4, 4, transpose_kernel=True), 1, ""),
    "ConvLocal": (
        lambda: nn.ConvLocal(5, (2,), strides=(2,), padding="VALID"),
        (8, 3),
        1,
        "bB",
    ),
    "Einsum": (lambda: nn.Einsum((3, 6, 4), "...d,ndh->...nh"), (6,), 1, "b"),
    "Einsum out": (lambda: nn.Einsum((3, 4, 6), "...nh,nhd->...d"), (3, 4), 1, ""),
    "Einsum out, in": (lambda: nn.Einsum((3, 6), "...d,nd->...n"), (6,), 1, ""),
}
# Kernels that count as those of other layers, which have the same name, shape, and bias, and are
# far more common.
MISTAKEN = {
    ("DenseGeneral 3-1", "b"),  # For a 2-D convolution: no linen layer but this sums over images.
    ("Einsum out, in", "-"),  # For a Dense layer.
}


def positions_of(module, x_shape):
    return tuple(range(len(x_shape) - 1)) if type(module) in (nn.Conv, nn.ConvTranspose) else ()


@pytest.mark.parametrize("kind", LINEN)
def test_linen(kind):
    make, x_shape, groups, certain = LINEN[kind]
    module, x = make(), normal(x_shape)
    shapes = jax.eval_shape(module.init, KEY, x)["params"]
    kernel, zeros = normal(shapes["kernel"].shape), jnp.zeros(shapes["bias"].shape)
    met = connections(
        lambda kernel, x: module.apply({"params": {"kernel": kernel, "bias": zeros}}, x),
        kernel,
        x,
        positions_of(module, x_shape),
    )
    named = f"{type(module).__name__}_0"
    for letter, parent, params in (
        ("b", "layer", shapes),
        ("-", "layer", {"kernel": shapes["kernel"]}),
        ("B", named, shapes),
        ("_", named, {"kernel": shapes["kernel"]}),
    ):
        if (kind, letter) in MISTAKEN:
            continue
        found = layouts(shapes_of({parent: params}))[f"{parent}/kernel"]
        taps = math.prod(kernel.shape[:-2])
        assert disagreement(found, met, groups=groups, taps=taps) == ""
        assert (letter in certain) == (not isinstance(found, Unknown)), (letter, found)


def test_the_oracle_rejects_all_other_axes():
    module, x = nn.Conv(5, (3, 2), padding="VALID"), normal((3, 2, 4))
    met = connections(
        lambda w, x: module.apply({"params": {"kernel": w, "bias": jnp.zeros(5)}}, x),
        normal((3, 2, 4, 5)),
        x,
        (0, 1),
    )
    accepted = [
        (i, o)
        for i in range(-4, 0)
        for o in range(-4, 0)
        if i != o
        and not disagreement(
            Axes((i,), (o,), tuple(axis for axis in range(-4, 0) if axis not in (i, o))), met
        )
    ]
    assert accepted == [(-2, -1)]
    assert disagreement(Axes((-3, -2), (-1,), (-4,)), met)
    assert disagreement(Axes((-2,), (-1,), ()), met)
    assert disagreement("embedding", met)
    assert disagreement("one input per output", met, taps=6)


NNX = {
    "Linear": (lambda rngs: nnx.Linear(6, 5, rngs=rngs), (6,), "b-"),
    "LinearGeneral 1-2": (lambda rngs: nnx.LinearGeneral(6, (2, 4), rngs=rngs), (6,), "b"),
    "LinearGeneral 2-1": (
        lambda rngs: nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), rngs=rngs),
        (2, 4),
        "",
    ),
    "Conv": (lambda rngs: nnx.Conv(4, 5, (3, 2), padding="VALID", rngs=rngs), (3, 2, 4), "b"),
    "Conv 1-D": (lambda rngs: nnx.Conv(4, 5, (3,), padding="VALID", rngs=rngs), (3, 4), ""),
    "ConvTranspose": (
        lambda rngs: nnx.ConvTranspose(4, 5, (3, 2), padding="VALID", rngs=rngs),
        (1, 1, 4),
        "b",
    ),
    "flipped": (
        lambda rngs: nnx.ConvTranspose(
            4, 5, (3, 2), padding="VALID", transpose_kernel=True, rngs=rngs
        ),
        (1, 1, 4),
        "b",
    ),
    "square flipped": (
        lambda rngs: nnx.ConvTranspose(
            4, 4, (3, 2), padding="VALID", transpose_kernel=True, rngs=rngs
        ),
        (1, 1, 4),
        "",
    ),
    "Einsum out": (
        lambda rngs: nnx.Einsum("...nh,nhd->...d", (3, 4, 6), (6,), rngs=rngs),
        (3, 4),
        "",
    ),
}


@pytest.mark.parametrize("kind", NNX)
def test_nnx(kind):
    make, x_shape, certain = NNX[kind]
    graph, state = nnx.split(make(nnx.Rngs(0)))
    shapes = {name: leaf.shape for name, leaf in named_leaves(state).items()}

    def apply(kernel, x):
        params = nnx.to_pure_dict(state) | {"bias": jnp.zeros(shapes["bias"]), "kernel": kernel}
        filled = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)(x)

    positions = tuple(range(len(x_shape) - 1)) if "C" in kind or "flip" in kind else ()
    met = connections(apply, normal(shapes["kernel"]), normal(x_shape), positions)
    for letter, names in (("b", ("kernel", "bias")), ("-", ("kernel",))):
        tree = {f"layer/{name}": shapes[name] for name in names}
        found = layouts(tree)["layer/kernel"]
        assert disagreement(found, met) == ""
        assert (letter in certain) == (not isinstance(found, Unknown)), (letter, found)
        saved = {f"{name}/value": shape for name, shape in tree.items()}
        assert layouts(saved)["layer/kernel/value"] == found


@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.parametrize("bias", [True, False])
def test_attention(library, bias):
    if library == "linen":
        module = nn.MultiHeadDotProductAttention(
            num_heads=4, qkv_features=24, out_features=8, use_bias=bias
        )
        params = jax.eval_shape(module.init, KEY, jnp.ones((1, 3, 16)))["params"]
    else:
        module = nnx.MultiHeadAttention(
            4, 16, 24, out_features=8, use_bias=bias, decode=False, rngs=nnx.Rngs(0)
        )
        params = nnx.state(module, nnx.Param)
    found = layouts(shapes_of({"a": params}))
    x, heads = normal((16,)), normal((4, 6))
    project = connections(lambda w, x: jnp.einsum("d,dnh->nh", x, w), normal((16, 4, 6)), x)
    combine = connections(lambda w, x: jnp.einsum("nh,nhd->d", x, w), normal((4, 6, 8)), heads)
    for role, met in [("query", project), ("key", project), ("value", project), ("out", combine)]:
        assert isinstance(found[f"a/{role}/kernel"], Axes)
        assert disagreement(found[f"a/{role}/kernel"], met) == ""


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["Dense", "Conv 2-D", "flipped", "DenseGeneral 1-2"])
def test_layers_stacked_by_vmap(kind, axis):
    make, x_shape, *_ = LINEN[kind]
    stacked = nn.vmap(
        lambda module, x: module(x),
        variable_axes={"params": axis},
        split_rngs={"params": True},
        in_axes=0,
    )

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return stacked(make().copy(name="layer"), x)

    x = normal((7, *x_shape))
    shapes = jax.eval_shape(Stack().init, KEY, x)["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)

    def apply(kernel, x):
        return Stack().apply({"params": {"layer": {**params["layer"], "kernel": kernel}}}, x)

    positions = tuple(1 + axis for axis in positions_of(make(), x_shape))
    met = connections(apply, normal(shapes["layer"]["kernel"].shape), x, positions)
    found = layouts(shapes_of(shapes))["layer/kernel"]
    assert isinstance(found, Axes)
    assert disagreement(found, met) == ""
    without = layouts({"layer/kernel": shapes["layer"]["kernel"].shape})["layer/kernel"]
    assert isinstance(without, Unknown)
