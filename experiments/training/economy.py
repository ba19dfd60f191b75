"""Tasks that compute in less memory: in bfloat16, or without keeping what is cheap to repeat.

Each function takes a task and returns the same task with another loss. What the loss is given is
sparse already, so masks always come from the float32 parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from experiments.tasks.task import Batch, Sums, Task, Variables

Tree = TypeVar("Tree")

# What remat keeps; all else is element by element, or sums of that, and computed again.
_KEPT = ("dot_general", "conv_general_dilated")


def in_bfloat16(task: Task) -> Task:
    """The task computed in bfloat16; parameters, gradients and collections stay float32.

    Parameters and floating point inputs are rounded on their way into the network, gradients are
    widened on their way back. What the network itself widens, such as means, stays wide.
    """

    def loss(
        params: Any, collections: Variables, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Variables]:
        value, updated = task.loss(_narrow(params), collections, _narrow(batch), key)
        return value.astype(jnp.float32), _as_before(updated, collections)

    def evaluate(params: Any, collections: Variables, batch: Batch) -> Sums:
        valid = {"valid": batch["valid"]} if "valid" in batch else {}
        return task.evaluate(_narrow(params), collections, {**_narrow(batch), **valid})

    def narrowly(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, collections, batch: function(
            _narrow(params), collections, _narrow(batch)
        )

    return dataclasses.replace(
        task,
        loss=loss,
        evaluate=evaluate,
        predict=None if task.predict is None else narrowly(task.predict),
    )


def with_remat(task: Task) -> Task:
    """The task whose backward pass computes again what lies between products.

    Only the results of matrix products and convolutions are kept from the forward pass.
    """

    def is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name in _KEPT

    loss: Callable[..., Any] = jax.checkpoint(task.loss, policy=is_kept)
    return dataclasses.replace(task, loss=loss)


def in_auto_axes(task: Task) -> Task:
    """The task for meshes with Explicit axes, whose network was written without thought of them.

    Inside the network the compiler places arrays, as it does with Auto axes. Loss, sums,
    predictions and collections come out whole on every device.
    """

    def automatic(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.sharding.auto_axes(function, out_sharding=PartitionSpec())

    return dataclasses.replace(
        task,
        loss=automatic(task.loss),
        evaluate=automatic(task.evaluate),
        predict=None if task.predict is None else automatic(task.predict),
    )


def _narrow(tree: Tree) -> Tree:
    def narrow(leaf: Any) -> Any:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(leaf, jnp.bfloat16) if is_float else leaf

    narrowed: Tree = jax.tree.map(narrow, tree)
    return narrowed


def _as_before(updated: Tree, before: Tree) -> Tree:
    same: Tree = jax.tree.map(lambda new, old: new.astype(old.dtype), updated, before)
    return same
