"""Names of leaves, for every kind of tree that holds parameters."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from nmjax.trees.leaves import map_named, named_leaves, nest


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


@flax.struct.dataclass
class FlaxLayer:
    kernel: Any
    bias: Any
    size: int = flax.struct.field(pytree_node=False, default=3)


class EquinoxLayer(eqx.Module):
    kernel: Any
    bias: Any
    size: int = eqx.field(static=True, default=3)


class TupleLayer(NamedTuple):
    kernel: Any
    bias: Any


def boxed(value):
    return nn.Partitioned(value, names=(None,) * np.ndim(value))


TREES = {
    "dict": {"a": {"kernel": 1, "bias": 2}},
    "FrozenDict": FrozenDict({"a": {"kernel": 1, "bias": 2}}),
    "dataclass": {"a": Layer(1, 2)},
    "flax.struct": {"a": FlaxLayer(1, 2)},
    "Equinox": {"a": EquinoxLayer(1, 2)},
    "NamedTuple": {"a": TupleLayer(1, 2)},
    "Partitioned": {"a": {"kernel": boxed(1), "bias": boxed(2)}},
    "LogicallyPartitioned": {
        "a": {"kernel": nn.LogicallyPartitioned(1, names=()), "bias": 2},
    },
    "NNX variables": {"a": {"kernel": nnx.Param(1), "bias": nnx.Param(2)}},
    "NNX state": nnx.State({"a": {"kernel": nnx.Param(1), "bias": nnx.Param(2)}}),
}


@pytest.mark.parametrize("kind", TREES)
def test_names_do_not_depend_on_the_kind_of_tree(kind):
    assert named_leaves(TREES[kind]) == {"a/kernel": 1, "a/bias": 2}


@pytest.mark.parametrize("kind", TREES)
def test_mapping_keeps_the_kind_of_tree(kind):
    tree = TREES[kind]
    seen = {}

    def note(name, leaf):
        seen[name] = leaf
        return leaf + 10

    result = map_named(note, tree)
    assert seen == {"a/kernel": 1, "a/bias": 2}
    assert jax.tree.structure(result) == jax.tree.structure(tree)
    assert named_leaves(result) == {"a/kernel": 11, "a/bias": 12}


def test_lists_and_tuples_are_named_by_position():
    assert named_leaves([(1, 2), (3, 4)]) == {"0/0": 1, "0/1": 2, "1/0": 3, "1/1": 4}


def test_a_single_array_has_the_empty_name():
    assert named_leaves(5) == {"": 5}


def test_integer_keys():
    assert named_leaves({0: {"kernel": 1}, 10: {"kernel": 2}}) == {"0/kernel": 1, "10/kernel": 2}


def test_missing_values_are_no_leaves():
    assert named_leaves({"kernel": 1, "bias": None}) == {"kernel": 1}


def test_names_come_in_tree_order():
    tree = {"b": 1, "a": [2, 3], "c": {"z": 4, "y": 5}}
    assert list(named_leaves(tree).values()) == jax.tree.leaves(tree)


def test_a_dict_key_called_value_stays_in_the_name():
    assert named_leaves({"value": {"kernel": 1}, "x": {"value": 2}}) == {
        "value/kernel": 1,
        "x/value": 2,
    }


def test_attention_in_nnx_keeps_its_value_projection():
    attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, rngs=nnx.Rngs(0), decode=False)
    names = named_leaves(nnx.state(attention, nnx.Param))
    kernels = {f"{part}/kernel" for part in ("query", "key", "value", "out")}
    assert {name for name in names if name.endswith("kernel")} == kernels


def test_two_leaves_of_one_name():
    tree = {"a/b": 1, "a": {"b": 2}}
    with pytest.raises(ValueError, match=r"two leaves .* have the name 'a/b'"):
        named_leaves(tree)


def test_is_leaf_stops_the_walk():
    tree = {"a": {"kernel": 1, "bias": None}}
    found = named_leaves(tree, is_leaf=lambda x: x is None)
    assert found == {"a/kernel": 1, "a/bias": None}
    whole = named_leaves(tree, is_leaf=lambda x: isinstance(x, dict) and "kernel" in x)
    assert whole == {"a": {"kernel": 1, "bias": None}}


def test_mapping_over_several_trees():
    a, b = {"x": {"w": 1}, "y": 2}, {"x": {"w": 10}, "y": 20}
    assert map_named(lambda name, u, v: (name, u + v), a, b) == {
        "x": {"w": ("x/w", 11)},
        "y": ("y", 22),
    }


def test_names_are_the_same_with_boxes_and_without():
    module = nn.Dense(
        4, kernel_init=nn.with_logical_partitioning(nn.initializers.ones, ("in", "out"))
    )
    params = module.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    assert isinstance(params["kernel"], nn.LogicallyPartitioned)
    assert named_leaves(params).keys() == named_leaves(nn.unbox(params)).keys()
    assert all(isinstance(leaf, jax.Array) for leaf in named_leaves(params).values())


# From names to trees


@pytest.mark.parametrize(
    "tree", [{}, {"a": 1}, {"a": {"b": {"c": 1}, "d": 2}, "e": 3}, {"": {"a": 1, "": 2}}, 5]
)
def test_nest_undoes_named_leaves(tree):
    assert nest(named_leaves(tree)) == tree


def test_nest_makes_dicts_of_everything():
    assert nest(named_leaves({"a": [1, (2, 3)]})) == {"a": {"0": 1, "1": {"0": 2, "1": 3}}}
    assert nest({"a//b": 1}) == {"a": {"": {"b": 1}}}


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a"), ("", "/a")])
def test_a_leaf_has_no_leaves_below_it(names):
    with pytest.raises(ValueError, match=r"is below another leaf|other leaves are below it"):
        nest(dict.fromkeys(names, 1))
