"""Tasks whose functions run another way: with less memory, or on meshes with Explicit axes.

Each function takes a task and returns the same task with another loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from experiments.tasks.task import Task

# What remat keeps. The rest is cheap to recompute: elementwise operations and sums of them.
_KEPT = ("dot_general", "conv_general_dilated")


def with_remat(task: Task) -> Task:
    """The task whose backward pass recomputes everything except products.

    Only the results of matrix products and convolutions are kept from the forward pass.
    """

    def is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name in _KEPT

    loss: Callable[..., Any] = jax.checkpoint(task.loss, policy=is_kept)
    return dataclasses.replace(task, loss=loss)


def in_auto_axes(task: Task) -> Task:
    """The task on a mesh with Explicit axes, for networks written without them in mind.

    Inside the network the compiler places arrays, as it does with Auto axes. Loss, sums,
    predictions and collections are whole on every device.
    """

    def automatic(function: Callable[..., Any]) -> Callable[..., Any]:
        # With Explicit axes, a product over a split axis needs its output's sharding spelled out,
        # which ordinary layers do not do.
        return jax.sharding.auto_axes(function, out_sharding=PartitionSpec())

    return dataclasses.replace(
        task,
        loss=automatic(task.loss),
        evaluate=automatic(task.evaluate),
        predict=None if task.predict is None else automatic(task.predict),
        # Traced without a mesh.
        traceable=task.traceable or task.evaluate,
    )
