"""Layouts of Equinox's layers, judged by what the layers compute, with and without their class."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.layouts import Unknown, layouts
from nmjax.trees.equinox_layers import layer_classes
from nmjax.trees.leaves import named_leaves
from tests.nmjax.oracle import connections, disagreement

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)


def normal(shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def shapes_of(tree):
    return {name: tuple(getattr(leaf, "shape", ())) for name, leaf in named_leaves(tree).items()}


# Layer, its input, positions, groups, and where the axes are certain without the class: with a bias
# ("b"), without one ("-").
LAYERS = {
    "Linear": (lambda b: eqx.nn.Linear(6, 5, use_bias=b, key=KEY), (6,), (), 1, "b-"),
    "square": (lambda b: eqx.nn.Linear(6, 6, use_bias=b, key=KEY), (6,), (), 1, "b-"),
    "Conv1d": (lambda b: eqx.nn.Conv1d(4, 5, 3, use_bias=b, key=KEY), (4, 3), (1,), 1, "b"),
    "Conv2d": (lambda b: eqx.nn.Conv2d(4, 5, 3, use_bias=b, key=KEY), (4, 3, 3), (1, 2), 1, "b"),
    "square Conv2d": (
        lambda b: eqx.nn.Conv2d(4, 4, 3, use_bias=b, key=KEY),
        (4, 3, 3),
        (1, 2),
        1,
        "b",
    ),
    "Conv3d": (
        lambda b: eqx.nn.Conv3d(3, 4, 2, use_bias=b, key=KEY),
        (3, 2, 2, 2),
        (1, 2, 3),
        1,
        "b",
    ),
    "groups": (
        lambda b: eqx.nn.Conv2d(4, 6, 3, groups=2, use_bias=b, key=KEY),
        (4, 3, 3),
        (1, 2),
        2,
        "b",
    ),
    "depthwise": (
        lambda b: eqx.nn.Conv2d(4, 4, 3, groups=4, use_bias=b, key=KEY),
        (4, 3, 3),
        (1, 2),
        4,
        "",  # Or a stack of 1-D convolutions.
    ),
    "ConvTranspose1d": (
        lambda b: eqx.nn.ConvTranspose1d(4, 5, 3, use_bias=b, key=KEY),
        (4, 1),
        (1,),
        1,
        "b",
    ),
    "ConvTranspose2d": (
        lambda b: eqx.nn.ConvTranspose2d(4, 5, 3, use_bias=b, key=KEY),
        (4, 1, 1),
        (1, 2),
        1,
        "b",
    ),
    "transposed in groups": (
        lambda b: eqx.nn.ConvTranspose2d(4, 6, 3, groups=2, use_bias=b, key=KEY),
        (4, 1, 1),
        (1, 2),
        2,
        "b",
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind):
    make, x_shape, positions, groups, certain = LAYERS[kind]
    layer = make(False)
    met = connections(
        lambda weight, x: eqx.tree_at(lambda layer: layer.weight, layer, weight)(x),
        normal(layer.weight.shape),
        normal(x_shape),
        positions,
    )
    taps = int(np.prod(layer.weight.shape[2:]))
    for bias, letter in ((True, "b"), (False, "-")):
        tree = {"layer": make(bias)}
        without_class = layouts(shapes_of(tree))["layer/weight"]
        assert disagreement(without_class, met, groups=groups, taps=taps) == ""
        assert (letter in certain) == (not isinstance(without_class, Unknown)), without_class
        with_class = layouts(shapes_of(tree), layer_classes(tree))["layer/weight"]
        assert disagreement(with_class, met, groups=groups, taps=taps) == ""
        assert not isinstance(with_class, Unknown)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_stacked_by_vmap(kind, bias):
    make, x_shape, positions, *_ = LAYERS[kind]
    stack = eqx.filter_vmap(lambda _: make(bias))(jnp.arange(7))
    one = make(False)
    met = connections(
        jax.vmap(lambda weight, x: eqx.tree_at(lambda layer: layer.weight, one, weight)(x)),
        normal(stack.weight.shape),
        normal((7, *x_shape)),
        tuple(axis + 1 for axis in positions),
    )
    for classes in ({}, layer_classes({"layer": stack})):
        found = layouts(shapes_of({"layer": stack}), classes)["layer/weight"]
        assert disagreement(found, met) == ""
        assert bias == (not isinstance(found, Unknown))


@pytest.mark.parametrize("cell", [eqx.nn.GRUCell, eqx.nn.LSTMCell])
def test_recurrent_cells_keep_out_in(cell):
    layer = cell(6, 4, key=KEY)
    found = layouts(shapes_of(layer), layer_classes(layer))
    gates = layer.weight_ih.shape[0] // 4
    for leaf, x in (("weight_ih", normal(6)), ("weight_hh", normal(4))):
        weight = getattr(layer, leaf)
        assert weight.shape == (gates * 4, len(x))
        met = connections(lambda w, x: w @ x, weight, x)
        assert disagreement(found[leaf], met) == ""
        assert not isinstance(found[leaf], Unknown)


def test_the_class_decides_before_the_name():
    tree = {
        "conv": eqx.nn.Embedding(8, 4, key=KEY),
        "embed": eqx.nn.Linear(8, 4, use_bias=False, key=KEY),
        "linear": eqx.nn.LayerNorm((3, 4), use_bias=False),
        "dense": eqx.nn.PReLU(),
        "c_proj": eqx.nn.Linear(4, 4, key=KEY),
    }
    found = layouts(shapes_of(tree), layer_classes(tree))
    assert found["conv/weight"] == "embedding"
    assert found["embed/weight"].reduction == (-1,)
    assert found["linear/weight"] == "normalization"
    assert found["c_proj/weight"].reduction == (-1,)
    by_name = layouts(shapes_of(tree))
    assert by_name["embed/weight"] == "embedding"
    assert isinstance(by_name["c_proj/weight"], Unknown)


def test_classes_are_found_in_nested_layers_and_in_shapes():
    model = [eqx.nn.MLP(3, 4, 5, 1, key=KEY), {"norm": eqx.nn.LayerNorm(4)}]
    expected = {
        "0": "MLP",
        "0/layers/0": "Linear",
        "0/layers/1": "Linear",
        "1/norm": "LayerNorm",
    }
    assert layer_classes(model) == expected
    assert layer_classes(eqx.filter_eval_shape(lambda: model)) == expected
    assert layer_classes(model[0].layers[0]) == {"": "Linear"}


class Own(eqx.Module):
    """A layer of a user, who may store its weight in any order."""

    weight: jax.Array
    bias: jax.Array | None = None


class OwnLinear(eqx.nn.Linear):
    pass


def test_modules_of_users_are_found_without_a_class():
    model = Own({"inner": eqx.nn.Linear(3, 4, key=KEY), "more": [Own(jnp.ones((3, 4)))]})
    expected = {"": "", "weight/inner": "Linear", "weight/more/0": ""}
    assert layer_classes(model) == expected
    assert layer_classes(eqx.filter_eval_shape(lambda: model)) == expected
    assert layer_classes({"own": OwnLinear(3, 4, key=KEY)}) == {"own": ""}


@pytest.mark.parametrize(
    ("shape", "bias"),
    [
        ((8, 4), None),
        ((4, 4), (4,)),
        ((8, 4), (4,)),
        ((8, 4, 3), (8,)),
        ((12, 8, 4), None),
        ((12, 4, 4), (12, 4)),
    ],
)
@pytest.mark.parametrize("name", ["own", "conv"])
def test_weights_in_modules_of_users_are_unknown(shape, bias, name):
    own = Own(jnp.ones(shape), None if bias is None else jnp.ones(bias))
    tree = {name: own, "linear": eqx.nn.Linear(4, 4, key=KEY)}
    found = layouts(shapes_of(tree), layer_classes(tree))
    assert isinstance(found[f"{name}/weight"], Unknown)
    assert found["linear/weight"].reduction == (-1,)


def test_a_bias_shows_the_outputs_of_a_module_of_a_user():
    tree = {"own": OwnLinear(4, 8, key=KEY), "stack": Own(jnp.ones((12, 8, 4)), jnp.ones((12, 8)))}
    found = layouts(shapes_of(tree), layer_classes(tree))
    assert found["own/weight"] == found["stack/weight"] == ((-1,), (-2,), ())


class Cell(eqx.Module):
    kernel: jax.Array
    weight_hh: jax.Array
    w: jax.Array
    bias: jax.Array | None = None


def test_other_leaves_in_modules_of_users():
    tree = {"embed": Own(jnp.ones((8, 4))), "norm": Own(jnp.ones(4), jnp.ones(4))}
    assert layouts(shapes_of(tree), layer_classes(tree)) == {
        "embed/weight": "embedding",
        "norm/weight": "1-D",
        "norm/bias": "bias",
    }
    cell = Cell(*jnp.ones((3, 8, 4)))
    found = layouts(shapes_of(cell), layer_classes(cell))
    assert {name: type(outcome) for name, outcome in found.items()} == dict.fromkeys(
        ("kernel", "weight_hh", "w"), Unknown
    )
    assert not any(isinstance(outcome, Unknown) for outcome in layouts(shapes_of(cell)).values())
    with_bias = Cell(*jnp.ones((3, 8, 4)), jnp.ones(5))
    found = layouts(shapes_of(with_bias), layer_classes(with_bias))
    assert isinstance(found["weight_hh"], Unknown)
