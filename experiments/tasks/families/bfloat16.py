"""A task computed in bfloat16, for networks that have no dtype of their own.

The loss is given parameters that are sparse already, so masks still come from the float32 ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from experiments.tasks.task import Batch, Sums, Task, Variables

Tree = TypeVar("Tree")


def in_bfloat16(task: Task) -> Task:
    """The task computed in bfloat16; parameters, gradients and collections stay float32.

    Parameters and floating point inputs are rounded on their way into the network, gradients are
    widened on their way back. What the network itself widens, such as means, stays wide.
    """

    def loss(
        params: Any, collections: Variables, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Variables]:
        # Cast inside of what is differentiated: the gradient of a cast widens again, so the
        # optimizer gets float32.
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


def _narrow(tree: Tree) -> Tree:
    def narrow(leaf: Any) -> Any:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(leaf, jnp.bfloat16) if is_float else leaf

    narrowed: Tree = jax.tree.map(narrow, tree)
    return narrowed


def _as_before(updated: Tree, before: Tree) -> Tree:
    same: Tree = jax.tree.map(lambda new, old: new.astype(old.dtype), updated, before)
    return same
