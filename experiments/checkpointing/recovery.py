"""Recovery after pruning: tasks that start from given weights, and learn from a dense network.

Each function takes a task and returns the same task with another beginning or another loss.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import nmjax
from experiments.tasks.task import Batch, Task, Variables
from nmjax.files.checkpoints import read_checkpoint
from nmjax.files.restoring import restore_like
from nmjax.files.tensor_files import open_tensors, read_note
from nmjax.trees.leaves import named_leaves

# Where the variables may lie: in a checkpoint of a run, or at the top of a file.
_PLACES = (("state", "train"), ("train",), ())


def starting_from(task: Task, path: Path) -> Task:
    """The task whose network starts from the variables in a file, whatever the seed.

    Args:
      task: any task.
      path: a file that `--packed` or `nmjax.save_packed` wrote, a dense one with the names of the
        network's variables, or the folder of a checkpoint of a run with one seed.

    Raises:
      ValueError: the file holds other variables; the message lists them.
      OSError: it cannot be read.
    """
    variables = read_variables(task, path)

    def init(key: jax.Array) -> Variables:
        del key
        return jax.tree.map(jnp.asarray, variables)

    return dataclasses.replace(task, init=init)


def distilled(task: Task, teacher: Path, weight: float, temperature: float) -> Task:
    """The task whose loss also compares the network with another one, such as the dense network.

        loss = (1 - weight) loss + weight T^2 mean KL(softmax(t / T) || softmax(z / T))

    with logits z of the network in training and t of the teacher in evaluation.

    Args:
      task: a task with `logits`.
      teacher: as in `starting_from`.
      weight: between 0 and 1.
      temperature: T, above 0.

    Raises:
      ValueError: the task has no logits; a number is out of range; as in `starting_from`.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    logits = task.logits
    if logits is None:
        raise ValueError(f"task {task.name} has no logits to compare: train without --distill")
    if not 0 <= weight <= 1:
        raise ValueError(f"distill_weight lies between 0 and 1, got {weight}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    variables = read_variables(task, teacher)

    def loss(
        params: Any, collections: Variables, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Variables]:
        own, updated = task.loss(params, collections, batch, key)
        known = dict(variables)
        targets = jax.lax.stop_gradient(logits(known.pop("params"), known, batch, None))
        # The same computation as in `task.loss`, which XLA does once.
        found = logits(params, collections, batch, key)
        divergence = soft_divergence(targets / temperature, found / temperature)
        return (1 - weight) * own + weight * temperature**2 * divergence, updated

    return dataclasses.replace(task, loss=loss)


def soft_divergence(targets: jax.Array, found: jax.Array) -> jax.Array:
    """The mean of KL(softmax(targets) || softmax(found)) over all but the last axis, in float32."""
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (targets, found))
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1).mean()


def read_variables(task: Task, path: Path) -> Variables:
    """Reads the variables of a task's network; raises what `starting_from` raises."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    tree = _unpacked(path)
    wanted = jax.eval_shape(task.init, jax.random.key(0))
    for place in _PLACES:
        node: Any = tree
        for key in place:
            node = node.get(key, {}) if isinstance(node, dict) else {}
        if "params" in node:
            tree = {**node, **node.get("collections", {})}
            break
    else:
        # Parameters alone, as `nmjax prune` writes of a file with them.
        tree = {"params": tree}
    leaves = named_leaves({name: tree[name] for name in wanted if name in tree})
    try:
        variables: Variables = restore_like(wanted, leaves)
    except ValueError as error:
        raise ValueError(
            f"{path} does not hold the variables of {task.name}'s network: {error}"
        ) from error
    return variables


def _unpacked(path: Path) -> Any:
    is_packed = path.is_file() and path.suffix == ".safetensors"
    if is_packed and read_note(open_tensors(path).metadata).get("format") == "packed":
        return nmjax.unpack(nmjax.load_packed(path))
    return read_checkpoint(path)
