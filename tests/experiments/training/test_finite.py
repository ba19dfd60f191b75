"""Losses and weights that are not finite stop a run, and are not kept over good ones."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments.training.flags
from experiments.json_files import JsonLines
from experiments.train import main
from experiments.training.finite import check_finite, first_bad_leaf
from experiments.training.job import assemble_job
from experiments.training.loop import train
from experiments.training.step import make_programs
from nmjax.files.checkpoints import read_checkpoint
from tests.experiments.tiny import STEPS, tiny_task


def task_with_a_bad_update(at, *, epochs=2):
    """The update after `at` steps makes a kernel NaN, although its loss is finite."""
    task = tiny_task(epochs=epochs)

    def train_batches(seed, epoch):
        for step, batch in enumerate(task.train_batches(seed, epoch), epoch * STEPS):
            yield {**batch, "bad": np.full(len(batch["label"]), step == at, np.float32)}

    def loss(params, collections, batch, key):
        value, collections = task.loss(params, collections, batch, key)
        # The square root of zero is fine, and its gradient is not.
        norm = jnp.sqrt((params["middle"]["kernel"] ** 2).sum() * (1 - batch["bad"][0]))
        return value + 1e-6 * norm, collections

    return dataclasses.replace(task, train_batches=train_batches, loss=loss)


@pytest.mark.parametrize("seeds", [(3,), (3, 5)])
def test_the_last_update_is_checked(seeds):
    job = assemble_job(task_with_a_bad_update(2 * STEPS - 1), "ste", "2:4")
    reports = train(job, seeds=seeds)
    assert next(reports).epoch == 1
    message = r"middle/kernel of seed 3 is not finite after 10 steps: .*Try a lower learning rate"
    with pytest.raises(FloatingPointError, match=message):
        next(reports)


def test_a_bad_loss_is_named_with_its_step_and_the_first_bad_leaf():
    job = assemble_job(task_with_a_bad_update(STEPS), "ste", "2:4")
    message = (
        r"seed 0 is not finite from step 6 on \(epoch 2, .*, and \S+/\S+ is the first variable"
    )
    with pytest.raises(FloatingPointError, match=message):
        list(train(job))


@pytest.mark.parametrize(
    ("given", "last", "message"),
    [
        (["--checkpoint-steps", "1"], 8, "middle/kernel of seed 0 is not finite after 9 steps"),
        ([], 5, "the loss of seed 0 is not finite from step 9 on"),
    ],
    ids=["steps", "epochs"],
)
def test_a_bad_state_is_not_kept_over_good_ones(
    tmp_path, monkeypatch, capsys, given, last, message
):
    make = task_with_a_bad_update(8, epochs=3)
    monkeypatch.setattr(experiments.training.flags, "find_task", lambda name: lambda flags: make)
    flags = ["--keep-checkpoints", "1", "--keep-best", "0", "--log-every", "0", *given]
    flags += ["--runs-dir", str(tmp_path), "--name", "run"]
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert re.search(rf"^error: .*{message}.*: training stopped; this state is not saved", error)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")] == [str(last)]
    tree = read_checkpoint(tmp_path / "run" / "checkpoints" / str(last) / "state", "state/train")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree["params"]))
    assert len(JsonLines(tmp_path / "run" / "metrics.jsonl").read()) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_variable_is_checked(value):
    job = assemble_job(tiny_task(), "ste", "2:4")
    programs = make_programs(job)
    state = programs.begin(programs.init(np.int32(0)), np.int32(0), np.float32(0))
    check_finite(*programs.bad(state), state, (0,), STEPS)
    for tree in ("params", "collections"):
        for path, _ in jax.tree.leaves_with_path(getattr(state, tree)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            bad = jax.tree.map_with_path(
                lambda other, leaf, path=path: (
                    leaf.at[(-1,) * leaf.ndim].set(value) if other == path else leaf
                ),
                getattr(state, tree),
            )
            changed = state._replace(**{tree: bad})
            with pytest.raises(FloatingPointError, match=rf"^{name} of seed 0 is not finite"):
                check_finite(*programs.bad(changed), changed, (0,), STEPS)


def test_whole_numbers_are_finite():
    assert first_bad_leaf({"a": jnp.arange(3), "b": jnp.ones(2)}, {}) == -1
