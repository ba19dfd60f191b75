"""Folders of Orbax: the one that is meant is found, and only what is asked for is read."""

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from nmjax.files.checkpoints import open_checkpoint, read_checkpoint, read_params
from nmjax.trees.leaves import named_leaves

PARAMS = {"a": {"kernel": np.arange(32, dtype="float32").reshape(8, 4), "bias": np.ones(4, "f4")}}
STATE = {"train": {"params": PARAMS, "opt_state": optax.adam(1e-3).init(PARAMS)}}


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def assert_params(found):
    params, where = found
    assert where.endswith("params")
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


@pytest.fixture
def run(tmp_path):
    """The folder of a run, whose checkpoints have a tree and JSON beside it."""
    folder = tmp_path / "run" / "checkpoints"
    with ocp.CheckpointManager(folder, item_names=("state", "about")) as manager:
        for steps in (9, 10):
            items = {"state": ocp.args.StandardSave(STATE), "about": ocp.args.JsonSave({"a": 1})}
            manager.save(steps, args=ocp.args.Composite(**items))
    return tmp_path / "run"


def test_a_step_with_files_beside_the_tree(run):
    assert_params(read_params(run / "checkpoints" / "10"))
    read = read_checkpoint(run / "checkpoints" / "10", "train/params/a")
    np.testing.assert_array_equal(read["kernel"], PARAMS["a"]["kernel"])


@pytest.mark.parametrize("folder", [".", "checkpoints"])
def test_folders_above_name_the_newest_step(run, folder):
    with pytest.raises(ValueError, match=r"several steps; pass one of them, such as \S+/10$"):
        read_params(run / folder)


def test_one_tree_of_the_manager(tmp_path):
    with ocp.CheckpointManager(tmp_path / "x") as manager:
        manager.save(3, args=ocp.args.StandardSave(STATE))
    assert_params(read_params(tmp_path / "x" / "3"))


def test_several_trees(tmp_path):
    for name in ("actor", "critic"):
        save(tmp_path / "x" / name, STATE)
    with pytest.raises(ValueError, match=r"several trees; pass one of them: \S+actor, \S+critic$"):
        read_params(tmp_path / "x")


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    save(tmp_path / "x", STATE)
    asked = []
    restore = ocp.PyTreeCheckpointHandler.restore

    def spy(self, directory, args):
        asked.extend(
            name
            for name, leaf in named_leaves(args.item, is_leaf=lambda x: x is ...).items()
            if leaf is not ocp.PLACEHOLDER
        )
        return restore(self, directory, args=args)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", spy)
    checkpoint = open_checkpoint(tmp_path / "x").params()
    shapes = named_leaves(checkpoint.shapes)
    assert {name: leaf.shape for name, leaf in shapes.items()} == {
        "a/kernel": (8, 4),
        "a/bias": (4,),
    }
    assert asked == []
    assert_params((checkpoint.read(), checkpoint.where))
    assert asked == ["train/params/a/bias", "train/params/a/kernel"]


def test_names_with_line_breaks(tmp_path):
    save(tmp_path / "x", {"a\nb": np.ones(2)})
    with pytest.raises(ValueError, match=r"the name 'a\\nb' has a line break"):
        read_checkpoint(tmp_path / "x")


def test_what_is_not_an_array_is_left_out(tmp_path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", {"params": PARAMS, "name": "text", "none": None, "n": 3})
    assert named_leaves(read_checkpoint(tmp_path / "x")).keys() == {
        "n",
        "params/a/bias",
        "params/a/kernel",
    }
