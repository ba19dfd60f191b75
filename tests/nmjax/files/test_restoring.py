"""Packed files into trees of every structure; random keys, and leaves that are not arrays."""

import json
import warnings
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nmjax
from nmjax import load_packed, save_packed
from nmjax.files.tensor_files import read_tensors, write_tensors
from nmjax.packed.weight import is_packed
from nmjax.trees.leaves import named_leaves

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


class Pair(NamedTuple):
    first: object
    second: object


@flax.struct.dataclass
class Layer:
    kernel: object
    bias: object
    name: str = flax.struct.field(pytree_node=False, default="layer")


def layer():
    return {"kernel": normal(8, 4), "bias": normal(4)}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(11)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


TREES = {
    "list": lambda: [layer() for _ in range(11)],
    "tuple": lambda: (layer(), (layer(),)),
    "named tuple": lambda: Pair(layer(), [layer()]),
    "dataclass": lambda: {"a": Layer(normal(8, 4), normal(4), "mine")},
    "boxes": lambda: {"a": {"kernel": nn.Partitioned(normal(8, 4), ("in", "out"))}},
    "haiku": lambda: {"net/~/linear": {"w": normal(8, 4), "b": normal(4)}},
    "nnx": lambda: nnx.state(Net(nnx.Rngs(0))),
    "nnx params": lambda: nnx.state(Net(nnx.Rngs(0)), nnx.Param),
}


def numbers(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(numbers(x), numbers(y))


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("form", ["dense", "packed", "shapes"])
def test_the_structure_of_like(tmp_path, kind, form):
    tree = TREES[kind]()
    plan = nmjax.make_plan(tree, "2:4")
    packed = nmjax.pack(nmjax.prune(tree, plan), plan)
    save_packed(tmp_path / "x", packed)
    other = jax.tree.map(lambda x: x if x.dtype == "key<fry>" else jnp.zeros_like(x), packed)
    like = {"dense": tree, "packed": other, "shapes": jax.eval_shape(lambda: tree)}[form]
    assert_same(load_packed(tmp_path / "x", like=like), packed)
    # Without `like`, the names are the same.
    by_name = named_leaves(load_packed(tmp_path / "x"), is_leaf=is_packed)
    assert by_name.keys() == named_leaves(packed, is_leaf=is_packed).keys()


def test_a_loaded_state_runs(tmp_path):
    model = Net(nnx.Rngs(0))
    save_packed(tmp_path / "x", nnx.state(model))
    other = Net(nnx.Rngs(1))
    nnx.update(other, load_packed(tmp_path / "x", like=nnx.state(other)))
    np.testing.assert_array_equal(model.dropout(jnp.ones(64)), other.dropout(jnp.ones(64)))


@pytest.mark.parametrize(
    ("like", "complaints"),
    [
        ([layer()], ["1/bias is only in the file", "1/kernel is only in the file"]),
        ([layer(), layer(), layer()], ["2/bias is missing in the file"]),
        (
            [layer(), {"kernel": normal(4, 8), "bias": normal(4)}],
            ["1/kernel: like= has float32 of shape (4, 8), the file has float32 of shape (8, 4)"],
        ),
        (
            [layer(), {"kernel": normal(8, 4), "bias": jax.random.split(jax.random.key(0), 4)}],
            [
                "1/bias: like= has a random key (key<fry>) of shape (4,), "
                "the file has float32 of shape (4,)"
            ],
        ),
        ([layer(), {"kernel": normal(8, 4), "bias": 1.0}], ["1/bias is only in the file"]),
        (
            [layer(), {"kernel": normal(8, 4).astype(jnp.bfloat16), "bias": np.ones(4, int)}],
            [
                "1/kernel: like= has bfloat16 of shape (8, 4), the file has float32 of shape",
                "1/bias: like= has int",
                "Pass like= with the dtypes of the file",
            ],
        ),
    ],
)
def test_trees_of_other_leaves(tmp_path, like, complaints):
    tree = [layer(), layer()]
    plan = nmjax.make_plan(tree, "2:4")
    save_packed(tmp_path / "x", nmjax.pack(nmjax.prune(tree, plan), plan))
    with pytest.raises(ValueError, match="its leaves are not those of like=") as error:
        load_packed(tmp_path / "x", like=like)
    for complaint in complaints:
        assert complaint in str(error.value)
    assert str(tmp_path / "x") in str(error.value)


def test_long_lists_of_complaints_are_cut(tmp_path):
    save_packed(tmp_path / "x", {f"a{i}": jnp.ones(1) for i in range(100)})
    with pytest.raises(ValueError, match="and 81 more") as error:
        load_packed(tmp_path / "x", like={"b": jnp.ones(1)})
    assert len(str(error.value).splitlines()) == 22


# Leaves that are not arrays


def test_what_is_not_an_array_comes_from_like(tmp_path):
    tree = {"a": layer(), "activation": jax.nn.relu, "rate": 0.5, "mode": "train"}
    plan = nmjax.make_plan(tree["a"], "2:4")
    packed = {**tree, "a": nmjax.pack(nmjax.prune(tree["a"], plan), plan)}
    save_packed(tmp_path / "x", packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_packed(tmp_path / "x", like={**tree, "rate": 0.1})
    assert (loaded["activation"], loaded["rate"], loaded["mode"]) == (jax.nn.relu, 0.1, "train")
    assert_same(loaded["a"], packed["a"])
    with pytest.warns(UserWarning, match="not arrays: activation, mode, rate; pass like="):
        loaded = load_packed(tmp_path / "x")
    assert loaded.keys() == {"a"}


def test_an_equinox_model(tmp_path):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 4, 8, 2, key=jax.random.key(0))
    plan = nmjax.make_plan(model, "2:4")
    packed = nmjax.pack(nmjax.prune(model, plan), plan)
    save_packed(tmp_path / "x", packed)
    loaded = load_packed(tmp_path / "x", like=eqx.nn.MLP(8, 4, 8, 2, key=jax.random.key(1)))
    x = normal(8)
    expected = nmjax.unpack(packed)(x)
    np.testing.assert_array_equal(nmjax.unpack(loaded)(x), expected)


def test_sizes_leave_out_what_has_none():
    tree = {"a": layer(), "rng": jax.random.key(0), "rate": 0.5, "act": jax.nn.relu}
    assert nmjax.sizes(tree).leaves.keys() == {"a/bias", "a/kernel"}
    assert nmjax.sizes(jax.eval_shape(lambda: tree["rng"])).leaves == {}


# Random keys


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_random_keys_come_back(tmp_path, kind, shape):
    key = jax.random.key(7, impl=kind)
    key = jax.random.split(key, shape) if shape else key
    save_packed(tmp_path / "x", {"rng": key, "a": jnp.ones(2)})
    loaded = load_packed(tmp_path / "x")["rng"]
    assert loaded.dtype == key.dtype
    assert loaded.shape == shape
    assert (jax.random.key_data(loaded) == jax.random.key_data(key)).all()


def test_files_without_keys_are_of_the_first_version(tmp_path):
    for name, tree in (("x", {"a": jnp.ones(2)}), ("y", {"a": jax.random.key(0)})):
        save_packed(tmp_path / name, tree)
    versions = [
        json.loads(read_tensors(tmp_path / name)[1]["nmjax"])["version"] for name in ("x", "y")
    ]
    assert versions == [1, 2]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"keys": {"rng": "none"}}, "rng is not a random key"),
        ({"keys": {"rng": "rbg"}}, "rng is not a random key"),
        ({"keys": {"rng": 1}}, "the kind of rng is a int"),
        ({"keys": {"other": "rbg"}}, "the random key other is missing"),
        ({"keys": []}, "the keys is a list"),
        ({"left_out": [1]}, "a name in left_out is a int"),
        ({"left_out": "name"}, "left_out is a str"),
        ({"more": 1}, "should have the keys"),
    ],
)
def test_forged_keys(tmp_path, change, complaint):
    save_packed(tmp_path / "x", {"rng": jax.random.key(0)})
    tensors, metadata = read_tensors(tmp_path / "x")
    note = json.loads(metadata["nmjax"]) | change
    write_tensors(tmp_path / "y", tensors, {"nmjax": json.dumps(note)})
    with pytest.raises(ValueError, match=complaint):
        load_packed(tmp_path / "y")


def test_a_key_of_other_numbers_is_refused(tmp_path):
    save_packed(tmp_path / "x", {"rng": jax.random.key(0)})
    _, metadata = read_tensors(tmp_path / "x")
    for numbers in (np.zeros(2, np.int32), np.zeros(3, np.uint32), np.zeros((), np.uint32)):
        write_tensors(tmp_path / "y", {"rng": numbers}, metadata)
        with pytest.raises(ValueError, match="rng is not a random key"):
            load_packed(tmp_path / "y")


@pytest.mark.parametrize("shape", [lambda key: key, lambda key: jax.eval_shape(lambda: key)])
def test_a_key_of_another_generator_is_refused(tmp_path, shape):
    save_packed(tmp_path / "x", {"key": jax.random.key(0, impl="rbg")})
    message = r"key: like= has .*\(key<fry>\).*the file has .*\(key<rbg>\)"
    with pytest.raises(ValueError, match=message):
        load_packed(tmp_path / "x", like={"key": shape(jax.random.key(0))})


def test_what_is_not_a_path(tmp_path):
    for path in (3, None):
        with pytest.raises(TypeError, match="the path must be a text or a "):
            load_packed(path)
        with pytest.raises(TypeError, match="the path must be a text or a "):
            save_packed(path, {"a": jnp.ones(2)})
