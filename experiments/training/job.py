"""What is trained and how: a task, a plan of its sparse leaves, a method."""

from __future__ import annotations

from typing import NamedTuple

import jax

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
    """The plan of a task's model at a pattern, with the task's dense layers left dense."""
    variables = jax.eval_shape(task.init, jax.random.key(0))
    return nmjax.make_plan(variables["params"], pattern, exclude=task.keep_dense)
