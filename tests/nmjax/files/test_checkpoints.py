"""Checkpoints: every kind on disk gives the same tree, and training states give their params."""

import sys

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import nmjax
from nmjax.files.checkpoints import read_checkpoint, read_params
from nmjax.files.tensor_files import write_tensors
from nmjax.files.torch_layout import save_torch
from nmjax.trees.leaves import named_leaves
from tests.nmjax.packed_weights import prune_and_pack

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": RNG.normal(size=(8, 4)).astype("float32"), "bias": np.zeros(4, "float32")},
    "b": {"kernel": RNG.normal(size=(4, 2))},
}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


def named():
    return named_leaves(PARAMS)


def save_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def test_safetensors(tmp_path):
    write_tensors(tmp_path / "x.safetensors", named(), {})
    assert_same(read_checkpoint(tmp_path / "x.safetensors"), PARAMS)


def test_npz(tmp_path):
    np.savez(tmp_path / "x.npz", **named())
    assert_same(read_checkpoint(str(tmp_path / "x.npz")), PARAMS)


def test_orbax(tmp_path):
    with jax.enable_x64(True):
        save_orbax(tmp_path / "x", PARAMS)
    tree = read_checkpoint(tmp_path / "x")
    assert_same(tree, PARAMS)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_names_of_torch(tmp_path, metadata):
    tensors = {"a.weight": PARAMS["a"]["kernel"].T, "a.bias": PARAMS["a"]["bias"]}
    write_tensors(tmp_path / "x", tensors, metadata)
    tree = read_checkpoint(tmp_path / "x")
    assert tree["a"].keys() == {"weight", "bias"}
    assert nmjax.make_plan(tree, "2:4")["a/weight"].reduction_axes == (-1,)


def test_an_npz_with_names_of_torch(tmp_path):
    np.savez(tmp_path / "x.npz", **{"a.weight": np.ones((4, 8)), "a.bias": np.ones(4)})
    tree = read_checkpoint(tmp_path / "x.npz")
    assert named_leaves(tree).keys() == {"a/weight", "a/bias"}
    assert nmjax.make_plan(tree, "2:4")["a/weight"].reduction_axes == (-1,)


def test_our_own_dense_files(tmp_path):
    save_torch(tmp_path / "x", PARAMS)
    np.testing.assert_array_equal(
        read_checkpoint(tmp_path / "x")["a"]["weight"], PARAMS["a"]["kernel"].T
    )


def test_subtrees(tmp_path):
    write_tensors(tmp_path / "x", {f"state/params/{n}": x for n, x in named().items()}, {})
    assert_same(read_checkpoint(tmp_path / "x", "state/params"), PARAMS)
    with pytest.raises(ValueError, match="expected 'model', found state"):
        read_checkpoint(tmp_path / "x", "model")
    with pytest.raises(ValueError, match="found an array"):
        read_checkpoint(tmp_path / "x", "state/params/a/bias/more")


def test_subtrees_of_lists(tmp_path):
    save_orbax(tmp_path / "x", [{"a": np.zeros(2)}, {"a": np.ones(2)}])
    assert_same(read_checkpoint(tmp_path / "x", "1"), {"a": np.ones(2)})
    with pytest.raises(ValueError, match="expected '2', found 0, 1"):
        read_checkpoint(tmp_path / "x", "2")


# NNX states


class Net(nnx.Module):
    """Has a module called `value`, within attention."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(40, 16, rngs=rngs)
        self.conv = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=4, in_features=16, qkv_features=32, decode=False, rngs=rngs
        )
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(16, rngs=rngs)


@pytest.mark.parametrize("form", ["boxed", "pure"])
def test_nnx_states_have_the_names_of_the_live_state(tmp_path, form):
    state = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    save_orbax(tmp_path / "x", state if form == "boxed" else nnx.to_pure_dict(state))
    read = read_checkpoint(tmp_path / "x")
    live = named_leaves(state)
    assert "attention/value/kernel" in live
    # Orbax writes the keys of a list as text, so the order of leaves is not compared.
    assert named_leaves(read).keys() == live.keys()
    for name, leaf in named_leaves(read).items():
        np.testing.assert_array_equal(leaf, live[name])
    assert dict(nmjax.make_plan(read, "2:4")) == dict(nmjax.make_plan(state, "2:4"))


def test_nnx_training_states(tmp_path):
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)
    save_orbax(tmp_path / "x", {"model": nnx.state(net, nnx.Param), "more": nnx.state(optimizer)})
    with pytest.raises(ValueError, match=r"pass subtree= with .* At the top it has model, more$"):
        read_params(tmp_path / "x")
    read = named_leaves(read_checkpoint(tmp_path / "x", "model"))
    assert read.keys() == named_leaves(nnx.state(net, nnx.Param)).keys()


def test_modules_called_value_stay(tmp_path):
    linen = {
        "attention": {"value": {"kernel": np.ones((8, 4)), "bias": np.ones(4)}},
        "temperature": {"value": np.ones(1)},
    }
    assert_same(read_checkpoint(save_orbax(tmp_path / "x", linen)), linen)


# Training states

OPTIMIZER = optax.adam(1e-3).init(PARAMS)


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"params": PARAMS, "opt_state": OPTIMIZER, "step": np.int32(3)}, "params"),
        ({"params": PARAMS, "batch_stats": {"a": {"mean": np.ones(4)}}}, "params"),
        ({"state": {"train": {"params": PARAMS, "opt_state": OPTIMIZER}}}, "state/train/params"),
        # Where `params` are the variables of Flax, the moments contain `params` as well.
        (
            {"params": {"params": PARAMS}, "opt_state": optax.adam(1).init({"params": PARAMS})},
            "params",
        ),
        ([{"params": PARAMS}, OPTIMIZER], "0/params"),
        ({"params": {"params": PARAMS}, "opt": optax.adam(1).init({"params": PARAMS})}, "params"),
        ({"params": PARAMS, "optimizer": optax.sgd(1, momentum=0.9).init(PARAMS)}, "params"),
        # Here is nothing to leave out.
        ({"params": PARAMS}, ""),
        ({"params": {"params": PARAMS}}, ""),
        (PARAMS, ""),
    ],
)
def test_only_the_params_of_a_training_state(tmp_path, state, where):
    with jax.enable_x64(True):
        save_orbax(tmp_path / "x", state)
    params, found = read_params(tmp_path / "x")
    assert found == where
    assert_same(params, read_checkpoint(tmp_path / "x", where))
    plan = nmjax.make_plan(params, "2:4", on_indivisible="dense")
    assert {name.removeprefix("params/").removeprefix("params/") for name in plan} == {
        "a/kernel",
        "b/kernel",
    }


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            {"generator": {"params": PARAMS}, "critic": {"params": PARAMS}},
            "with one of them: critic/params, generator/params",
        ),
        ({"net": PARAMS, "opt_state": OPTIMIZER}, "no subtree called params"),
        ([PARAMS, OPTIMIZER], "no subtree called params.* it has 0, 1"),
        (OPTIMIZER, "no subtree called params"),
        (optax.adam(1).init({"params": PARAMS}), "no subtree called params"),
        ({"net": PARAMS, "param_states": OPTIMIZER}, "no subtree called params"),
    ],
)
def test_training_states_that_need_a_choice(tmp_path, state, words):
    with jax.enable_x64(True):
        save_orbax(tmp_path / "x", state)
    with pytest.raises(ValueError, match=words) as error:
        read_params(tmp_path / "x")
    assert "pass subtree=" in str(error.value)


def test_a_parameter_list_of_torch_called_params_is_no_training_state(tmp_path):
    tensors = {"fc.weight": np.ones((4, 8)), "params.0": np.ones(3)}
    write_tensors(tmp_path / "x", tensors, {"format": "pt"})
    params, where = read_params(tmp_path / "x")
    assert (named_leaves(params).keys(), where) == ({"fc/weight", "params/0"}, "")


# What is refused


def test_packed_files(tmp_path):
    nmjax.save_packed(tmp_path / "x", prune_and_pack(PARAMS, nmjax.make_plan(PARAMS, "2:4")))
    with pytest.raises(ValueError, match="already contains packed parameters"):
        read_checkpoint(tmp_path / "x")


def test_what_an_npz_file_cannot_hold(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(2, jax.numpy.bfloat16))
    with pytest.raises(ValueError, match="dtype of a was lost"):
        read_checkpoint(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match=r"not an \.npz file of plain arrays"):
        read_checkpoint(tmp_path / "x.npz")
    (tmp_path / "y.npz").write_bytes(b"no zip at all")
    with pytest.raises(ValueError, match=r"not an \.npz file of plain arrays"):
        read_checkpoint(tmp_path / "y.npz")


def test_files_and_folders_of_other_kinds(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "nothing.npz")
    (tmp_path / "x").write_text("text")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_checkpoint(tmp_path / "x")
    with pytest.raises(ValueError, match="not an Orbax checkpoint"):
        read_checkpoint(tmp_path)


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match="pip install orbax-checkpoint"):
        read_checkpoint(tmp_path)
