"""What is trained and how: a task, a plan of its sparse leaves, a method."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

import nmjax
from experiments.tasks.task import Task
from experiments.training.methods import Method, find_row


class Job(NamedTuple):
    """What is trained and how.

    Attributes:
      task: data, model, loss, metric, recipe.
      plan: which leaves are sparse; for dense training, the leaves to measure.
      method: from `experiments.training.methods`.
      accumulate: parts that a step splits its batch into, one after the other, to need less memory.
        Gradients are averaged over them; each part has its own batch statistics.
    """

    task: Task
    plan: nmjax.Plan
    method: Method
    accumulate: int = 1


def assemble_job(task: Task, method: str, pattern: str, accumulate: int = 1) -> Job:
    """Plans a task's model and builds the method for it.

    Raises:
      ValueError: there is no such method, or the pattern does not fit the model.
    """
    plan = plan_of(task, pattern)
    build = find_row(method).build
    return Job(task, plan, build(plan, task.recipe, task.steps_per_epoch), accumulate)


def plan_of(task: Task, pattern: str) -> nmjax.Plan:
    """The plan of a task's model at a pattern, with the task's dense layers left dense.

    The axes are read off the model's evaluation.
    """
    forward, params, inputs = evaluation(task)
    return nmjax.make_plan(params, pattern, exclude=task.keep_dense, forward=forward, inputs=inputs)


@lru_cache(maxsize=64)
def check_plan(task: Task, plan: nmjax.Plan) -> None:
    """Raises ValueError unless a plan's axes are those that the task's evaluation sums over."""
    forward, params, inputs = evaluation(task)
    nmjax.check_axes(plan, forward, params, *inputs)


class Evaluation(NamedTuple):
    """What a task's evaluation computes, to be traced.

    Attributes:
      forward: `(params, collections, batch) -> sums`, jitted, so that it is traced only once.
      params: shapes of the parameters.
      inputs: shapes of the collections and of a batch with one example.
    """

    forward: Callable[..., Any]
    params: Any
    inputs: tuple[Any, Any]


@lru_cache(maxsize=16)
def evaluation(task: Task) -> Evaluation:
    """A task's evaluation, in operations that nmjax can follow."""
    variables = jax.eval_shape(task.init, jax.random.key(0))
    batch = next(iter(task.read_test(lambda examples: np.arange(1))))
    collections = {name: tree for name, tree in variables.items() if name != "params"}
    return Evaluation(
        jax.jit(task.traceable or task.evaluate),
        variables["params"],
        (collections, jax.eval_shape(lambda arrays: arrays, batch)),
    )
