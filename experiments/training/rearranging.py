"""Sorts the channels of a trained network by size before blocks of them are pruned.

Blocks of 1xN keep or drop N neighboring output channels together. Sorted by the L1 norm of their
filters, large channels stand next to large ones, so that what a block loses is small. Everything
that runs along the channels moves with them, and the network computes the same function.

Source: Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks", TPAMI 2022, section
3.3, filter rearrangement.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import nmjax
from experiments.tasks.task import Batch, Variables
from experiments.training.job import Job, evaluation
from nmjax.pruning import Masks
from nmjax.trees.leaves import named_leaves


def free_channels(job: Job) -> tuple[nmjax.Channels, ...]:
    """The channels of a job's network whose order is free, read off its traced evaluation.

    Layers keep their order where their channels reach the output, or an operation that
    `nmjax.find_channels` does not know. A UserWarning names those of them that the plan prunes.
    """
    forward, params, (collections, batch) = evaluation(job.task)

    def of_variables(variables: Variables, batch: Batch) -> Any:
        others = {name: value for name, value in variables.items() if name != "params"}
        return forward(variables["params"], others, batch)

    found = nmjax.find_channels(of_variables, {**collections, "params": params}, batch)
    writers = {name.removeprefix("params/") for channels in found for name, _ in channels.writers}
    if kept := [name for name in job.plan if name not in writers]:
        warnings.warn(
            "these layers keep the order of their output channels, which cannot be rearranged "
            f"without changing what the network computes: {', '.join(kept)}",
            stacklevel=2,
        )
    return tuple(found)


def sort_network(
    channels: Sequence[nmjax.Channels], variables: Variables, opt_state: Any, masks: Sequence[Masks]
) -> tuple[Variables, Any, list[Masks]]:
    """Sorts channels by L1 norm in everything that runs along them.

    Args:
      channels: from `free_channels`.
      variables: "params", which decide the order, and Flax's other collections.
      opt_state: of the optimizer. Momentum, and whatever else has the structure and shapes of the
        parameters, is sorted with them.
      masks: of the parameters, any number.

    Returns:
      All three in the new order.
    """
    shapes = _shapes(variables["params"])
    # Optimizers name momentum differently, so it is recognized by its shape.
    parts, structure = jax.tree.flatten(opt_state, is_leaf=lambda part: _shapes(part) == shapes)
    alike = [i for i, part in enumerate(parts) if _shapes(part) == shapes]
    trees = [variables, *({"params": tree} for tree in (*(parts[i] for i in alike), *masks))]
    # The parameters decide each order, and sorting one group changes no norm of another.
    for group in channels:
        order = nmjax.l1_order(trees[0], group)
        trees = [_permute(tree, group, order) for tree in trees]
    variables, *others = trees
    # Not strict: the masks follow after the parts of the optimizer.
    for i, tree in zip(alike, others, strict=False):
        parts[i] = tree["params"]
    sorted_masks = [tree["params"] for tree in others[len(alike) :]]
    return variables, jax.tree.unflatten(structure, parts), sorted_masks


def _permute(tree: Any, channels: nmjax.Channels, order: jax.Array) -> Any:
    """Reorders the leaves that the tree has: momentum has no statistics, a mask few leaves."""
    there = named_leaves(tree)
    axes = tuple(pair for pair in (*channels.writers, *channels.followers) if pair[0] in there)
    return nmjax.permute_channels(tree, nmjax.Channels(axes), order)


def _shapes(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [jnp.shape(leaf) for leaf in leaves]
