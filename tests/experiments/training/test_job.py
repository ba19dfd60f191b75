"""Plans of jobs are read off the evaluation of the task's network; given plans are checked."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

import nmjax
from experiments.tasks.families.classification import classification_task
from experiments.tasks.task import Recipe
from experiments.training.economy import in_auto_axes
from experiments.training.job import Job, assemble_job, check_plan, evaluation, plan_of
from experiments.training.methods import METHODS
from experiments.training.step import make_programs
from tests.experiments.tiny import draw, tiny_task


class OutIn(nn.Module):
    """A network with a kernel that is stored as (out, in)."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(x.reshape(len(x), -1))
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (16, 4))
        return nn.Dense(4, name="head")(nn.relu(x @ kernel.T))


def eval_batches():
    yield {**draw(np.random.default_rng(0), 8), "valid": np.ones(8, np.float32)}


TASK = classification_task(
    name="out in",
    model=OutIn(),
    input_shape=(2, 2, 1),
    train_batches=lambda seed, epoch: eval_batches(),
    eval_batches=eval_batches,
    steps_per_epoch=1,
    recipe=Recipe(),
    keep_dense=("^head/",),
)


def test_axes_come_from_the_evaluation():
    plan = plan_of(TASK, "2:4")
    assert {name: leaf.reduction_axes for name, leaf in plan.items()} == {"kernel": (-1,)}
    assert plan["kernel"].source == "program"
    assert plan.dense["head/kernel"] == "excluded by '^head/'"


def test_a_task_for_explicit_axes_is_planned_without_a_mesh():
    for task in (TASK, tiny_task()):
        assert plan_of(in_auto_axes(task), "2:4") == plan_of(task, "2:4")


def test_the_evaluation_is_traced_once_for_all_patterns():
    calls = []

    def evaluate(params, collections, batch):
        calls.append(batch["image"].shape)
        return TASK.evaluate(params, collections, batch)

    task = dataclasses.replace(TASK, evaluate=evaluate)
    plans = [plan_of(task, pattern) for pattern in ("2:4", "1:4", "1x4@0.5")]
    for plan in plans:
        check_plan(task, plan)
    assert calls == [(1, 2, 2, 1)]


def test_operations_that_nmjax_can_follow_are_preferred():
    task = dataclasses.replace(TASK, traceable=TASK.evaluate, evaluate=None)
    assert plan_of(task, "2:4") == plan_of(TASK, "2:4")


def test_nothing_is_computed():
    forward, params, (collections, batch) = evaluation(TASK)
    for leaf in jax.tree.leaves((params, collections, batch)):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
    assert set(jax.eval_shape(forward, params, collections, batch)) >= {"count", "loss"}


def test_a_given_plan_is_checked():
    params = evaluation(TASK).params
    wrong = nmjax.make_plan(params, "2:4", axes={"^kernel": -2}, exclude="head")
    method = METHODS["ste"].build(wrong, TASK.recipe, TASK.steps_per_epoch)
    with pytest.raises(ValueError, match=r"kernel \(16, 4\): planned along -2, .* over -1"):
        make_programs(Job(TASK, wrong, method))
    make_programs(assemble_job(TASK, "ste", "2:4"))
