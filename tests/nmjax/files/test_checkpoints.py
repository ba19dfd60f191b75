"""Checkpoints of plain parameters: every kind on disk gives the same tree."""

import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import nmjax
from nmjax.files.checkpoints import read_checkpoint
from nmjax.files.tensor_files import write_tensors
from nmjax.files.torch_layout import save_torch

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
    return nmjax.trees.leaves.named_leaves(PARAMS)


def test_safetensors(tmp_path):
    write_tensors(tmp_path / "x.safetensors", named(), {})
    assert_same(read_checkpoint(tmp_path / "x.safetensors"), PARAMS)


def test_npz(tmp_path):
    np.savez(tmp_path / "x.npz", **named())
    assert_same(read_checkpoint(str(tmp_path / "x.npz")), PARAMS)


def test_orbax(tmp_path):
    with jax.enable_x64(True):
        checkpointer = ocp.StandardCheckpointer()
        checkpointer.save(tmp_path / "x", PARAMS)
        checkpointer.wait_until_finished()
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


# What is refused


def test_packed_files(tmp_path):
    nmjax.save_packed(tmp_path / "x", nmjax.pack(PARAMS, nmjax.make_plan(PARAMS, "2:4")))
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
