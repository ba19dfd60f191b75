"""Plans for the parameter trees of real models, and what they keep of those trees."""

import dataclasses
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import nmjax
from nmjax import make_plan
from nmjax.trees.leaves import named_leaves

KEY = jax.random.key(0)


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def axes_of(plan):
    return {name: leaf.reduction_axes for name, leaf in plan.items()}


def shapes_of(module, *inputs):
    return jax.eval_shape(module.init, KEY, *inputs)["params"]


def params_of(module, *inputs):
    return jax.jit(module.init)(KEY, *inputs)["params"]


class Block(nn.Module):
    """One of each layer that a Transformer with convolutions has."""

    @nn.compact
    def __call__(self, tokens, _=None):
        x = nn.Embed(32, 8, name="embed")(tokens)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        x = nn.Conv(16, (3,), name="out")(x)
        x = nn.Conv(16, (3,), feature_group_count=16, name="depthwise")(x)
        x = nn.Conv(16, (3,), feature_group_count=2, name="grouped")(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(8)(x), None


BLOCK_AXES = {
    "Dense_0/kernel": (-2,),
    "attention/key/kernel": (-3,),
    "attention/out/kernel": (-3, -2),
    "attention/query/kernel": (-3,),
    "attention/value/kernel": (-3,),
    "grouped/kernel": (-2,),
    "out/kernel": (-2,),
}
BLOCK_DENSE = {
    "BatchNorm_0/bias": "bias",
    "BatchNorm_0/scale": "normalization",
    "Dense_0/bias": "bias",
    "LayerNorm_0/bias": "bias",
    "LayerNorm_0/scale": "normalization",
    "attention/key/bias": "bias",
    "attention/out/bias": "bias",
    "attention/query/bias": "bias",
    "attention/value/bias": "bias",
    "depthwise/bias": "bias",
    "depthwise/kernel": "one input per output (depthwise)",
    "embed/embedding": "embedding",
    "grouped/bias": "bias",
    "out/bias": "bias",
}


def traced_plan(module, *inputs):
    variables = jax.eval_shape(module.init, KEY, *inputs)

    def forward(params, *inputs):
        stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables["batch_stats"])
        return module.apply({"params": params, "batch_stats": stats}, *inputs)

    return make_plan(variables["params"], "2:4", forward=forward, inputs=inputs)


def test_a_linen_transformer_with_convolutions():
    plan = traced_plan(Block(), jnp.zeros((1, 5), int))
    assert axes_of(plan) == BLOCK_AXES
    assert plan.dense == BLOCK_DENSE
    assert {leaf.source for leaf in plan.values()} == {"program"}


def test_names_and_shapes_leave_some_of_its_convolutions_unknown():
    params = shapes_of(Block(), jnp.zeros((1, 5), int))
    with pytest.raises(ValueError, match="unknown axes") as error:
        make_plan(params, "2:4")
    assert "out/kernel (3, 8, 16): could be" in str(error.value)
    plan = make_plan(params, "2:4", on_unknown="dense")
    assert {"out/kernel", "grouped/kernel"} == {
        name for name, reason in plan.dense.items() if "unknown" in reason
    }
    assert axes_of(plan).items() <= BLOCK_AXES.items()


def test_the_same_model_scanned_over_layers():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.scan(
                lambda block, carry, tokens: (carry, block(tokens)[0]),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=3,
            )(Block(name="blocks"), None, tokens)

    params = shapes_of(Scanned(), jnp.zeros((3, 1, 5), int))
    assert params["blocks"]["attention"]["query"]["kernel"].shape == (3, 8, 2, 4)
    assert params["blocks"]["LayerNorm_0"]["scale"].shape == (3, 8)
    plan = traced_plan(Scanned(), jnp.zeros((3, 1, 5), int))
    assert axes_of(plan) == {f"blocks/{name}": axes for name, axes in BLOCK_AXES.items()}
    assert plan.dense == {f"blocks/{name}": reason for name, reason in BLOCK_DENSE.items()}


def test_scanned_layers_are_masked_like_each_layer_alone():
    stacked = {"dense": {"kernel": normal((3, 8, 4)), "bias": jnp.zeros((3, 4))}, "attention": {}}
    for name in ("query", "key", "value"):
        stacked["attention"][name] = {"kernel": normal((3, 8, 2, 4))}
    stacked["attention"]["out"] = {"kernel": normal((3, 2, 4, 8))}
    masks = nmjax.compute_masks(stacked, make_plan(stacked, "2:4"))
    for i in range(3):
        layer = jax.tree.map(lambda p, i=i: p[i], stacked)
        alone = nmjax.compute_masks(layer, make_plan(layer, "2:4"))
        assert alone.keys() == masks.keys()
        for name, mask in alone.items():
            np.testing.assert_array_equal(masks[name][i], mask)


def test_linen_layers_one_by_one():
    image = jnp.zeros((1, 8, 8, 16))
    cases = [
        (nn.Conv(8, (3, 3)), image, (-2,)),
        (nn.Conv(8, (1, 1), feature_group_count=4), image, (-2,)),
        (nn.ConvTranspose(8, (2, 2), strides=(2, 2)), image, (-2,)),
        (nn.Dense(8), image, (-2,)),
    ]
    for module, x, axes in cases:
        plan = make_plan(shapes_of(module, x), "2:4")
        assert axes_of(plan) == {"kernel": axes}, module
        assert plan.dense == {"bias": "bias"}


def test_a_linen_lstm():
    cell = nn.LSTMCell(8)
    carry = cell.initialize_carry(KEY, (1, 16))
    plan = make_plan(shapes_of(cell, carry, jnp.zeros((1, 16))), "2:4")
    assert set(plan) == {f"{side}{gate}/kernel" for side in "ih" for gate in "ifgo"}
    assert set(axes_of(plan).values()) == {(-2,)}


def test_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(32, 8, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])
            self.conv = nnx.Conv(8, 4, (3, 3), rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    plan = make_plan(state, "2:4")
    assert axes_of(plan) == {
        "attention/key/kernel": (-3,),
        "attention/out/kernel": (-3, -2),
        "attention/query/kernel": (-3,),
        "attention/value/kernel": (-3,),
        "conv/kernel": (-2,),
        "layers/0/kernel": (-2,),
        "layers/1/kernel": (-2,),
    }
    assert plan.dense["embed/embedding"] == "embedding"
    assert plan.dense["norm/scale"] == "normalization"


class EquinoxModel(eqx.Module):
    linear: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    activation: Any

    def __init__(self):
        self.linear = eqx.nn.Linear(8, 4, key=KEY)
        self.conv = eqx.nn.Conv2d(4, 8, 3, key=KEY)
        self.norm = eqx.nn.LayerNorm(8)
        self.mlp = eqx.nn.MLP(8, 8, 8, depth=1, key=KEY)
        self.activation = jax.nn.relu


EQUINOX_AXES = {
    "linear/weight": (-1,),
    "conv/weight": (-3,),
    "mlp/layers/0/weight": (-1,),
    "mlp/layers/1/weight": (-1,),
}


def test_an_equinox_model_filtered():
    plan = make_plan(eqx.filter(EquinoxModel(), eqx.is_array), "2:4")
    assert axes_of(plan) == EQUINOX_AXES
    assert plan["conv/weight"].output_axes == (-4,)


def test_a_whole_equinox_model_with_its_functions():
    model = EquinoxModel()
    plan = make_plan(model, "2:4")
    assert axes_of(plan) == EQUINOX_AXES
    assert plan.dense["activation"] == "not an array"
    sparse = nmjax.sparsify(model, plan)
    assert sparse.activation is jax.nn.relu
    assert (sparse.linear.weight != 0).sum() == 16
    assert sparse.mlp(jnp.ones(8)).shape == (8,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


class Partitioned(nn.Module):
    box: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, kernel_init=self.box(nn.initializers.normal(), ("in", "out")))(x)


TREES = {
    "dict": {"a": {"kernel": normal((8, 4)), "bias": jnp.zeros(4)}},
    "FrozenDict": FrozenDict({"a": {"kernel": normal((8, 4)), "bias": jnp.zeros(4)}}),
    "dataclass": {"a": Layer(normal((8, 4)), jnp.zeros(4))},
    "list of dicts": [{"w": normal((8, 4)), "b": jnp.zeros(4)}],
    "NumPy": {"a": {"kernel": np.asarray(normal((8, 4))), "bias": np.zeros(4, np.float32)}},
    "half precision": {"a": {"kernel": normal((8, 4), dtype=jnp.bfloat16), "bias": jnp.zeros(4)}},
    "Partitioned": params_of(Partitioned(nn.with_partitioning), jnp.ones((1, 8))),
    "LogicallyPartitioned": params_of(Partitioned(nn.with_logical_partitioning), jnp.ones((1, 8))),
    "NNX state": nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Param),
    "Equinox": eqx.filter(eqx.nn.Linear(8, 4, key=KEY), eqx.is_array),
}


@pytest.mark.parametrize("kind", TREES)
def test_every_kind_of_tree_keeps_its_type_boxes_and_dtypes(kind):
    params = TREES[kind]
    plan = make_plan(params, "2:4")
    (name,) = plan
    masks = nmjax.compute_masks(params, plan)
    assert masks.keys() == {name}
    assert masks[name].dtype == bool
    for result in (nmjax.sparsify(params, plan), nmjax.prune(params, plan, masks)):
        assert type(result) is type(params)
        assert jax.tree.structure(result) == jax.tree.structure(params)
        for path, leaf in named_leaves(result).items():
            before = named_leaves(params)[path]
            assert leaf.dtype == before.dtype
            expected = jnp.where(masks[path], before, 0) if path == name else before
            np.testing.assert_array_equal(leaf, expected)
    assert (named_leaves(nmjax.prune(params, plan))[name] != 0).sum() == 16


@pytest.mark.parametrize("kind", TREES)
def test_shapes_alone_give_the_same_plan(kind):
    params = TREES[kind]
    assert make_plan(jax.eval_shape(lambda: params), "2:4") == make_plan(params, "2:4")


def test_boxes_leave_no_trace_in_the_plan():
    boxed = TREES["LogicallyPartitioned"]
    assert isinstance(boxed["Dense_0"]["kernel"], nn.LogicallyPartitioned)
    plan = make_plan(boxed, "2:4")
    assert plan == make_plan(nn.unbox(boxed), "2:4")
    np.testing.assert_array_equal(
        nmjax.compute_masks(boxed, plan)["Dense_0/kernel"],
        nmjax.compute_masks(nn.unbox(boxed), plan)["Dense_0/kernel"],
    )


def test_a_shape_of_a_box_without_the_box():
    abstract = jax.eval_shape(
        lambda: params_of(Partitioned(nn.with_partitioning), jnp.ones((1, 8)))
    )
    assert make_plan(abstract, "2:4") == make_plan(TREES["Partitioned"], "2:4")
