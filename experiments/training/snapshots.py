"""What a comparison keeps to show: images of the task, kernels, blocks and answers of networks."""

from __future__ import annotations

from typing import cast

import jax
import numpy as np

import nmjax
from experiments.json_files import Numbers
from experiments.tasks.task import Shown, Task
from experiments.training.step import Job, Programs, RunState
from nmjax.masks.blocks import split_blocks


def example_images(task: Task, count: int = 12) -> Numbers:
    """The first test images and their labels, where the task has small grey ones."""
    batch = next(iter(task.eval_batches()))
    images = batch.get("image", np.zeros(0))
    if images.ndim != 4 or images.shape[-1] != 1 or images.shape[1] > 32:
        return {}
    return {"images": images[:count, :, :, 0], "labels": batch["label"][:count]}


def shown(job: Job, programs: Programs, state: RunState) -> list[Shown]:
    """What the first seed's network does with the task's examples; empty where it shows none."""
    if job.task.show is None:
        return []
    network = jax.device_get((programs.forward(state.train), state.train.collections))
    if np.ndim(state.train.step):
        network = jax.tree.map(lambda leaf: leaf[0], network)
    return job.task.show(*network)


def kernel_shapes(job: Job, state: RunState) -> Numbers:
    """Which taps the first seed keeps in the second layer of 3x3 kernels, where there are two.

    Returns:
      The layer's name, and for each (input, output) channel the nine taps in row order as text,
      such as "010110010".
    """
    params = state.train.params
    if np.ndim(state.train.step):
        params = jax.tree.map(lambda leaf: leaf[0], params)
    masks = nmjax.compute_masks(params, job.plan)
    wide = [name for name, mask in masks.items() if mask.ndim == 4 and mask.shape[:2] == (3, 3)]
    if not wide:
        return {}
    taps = np.asarray(masks[wide[min(1, len(wide) - 1)]]).astype(int)
    kernels = taps.reshape(9, *taps.shape[2:]).transpose(1, 2, 0)
    codes = [["".join(map(str, kernel)) for kernel in row] for row in kernels]
    return {"layer": wide[min(1, len(wide) - 1)], "kernels": codes}


def block_masks(job: Job, state: RunState) -> Numbers:
    """The blocks that the first seed's largest layer keeps.

    Args:
      job: with a method that remembers masks of 1xN blocks.
      state: of it.

    Returns:
      The layer's name, and each row of blocks as text with a digit for each input channel, such
      as "0110".
    """
    masks = state.topology.used
    if np.ndim(state.train.step):
        masks = {name: mask[0] for name, mask in masks.items()}
    layer = max(reversed(list(masks)), key=lambda name: masks[name].size)
    flags = block_flags(job.plan[layer], masks[layer]).astype(int)
    return {"layer": layer, "rows": ["".join(map(str, row)) for row in flags]}


def block_flags(leaf: nmjax.LeafPlan, mask: jax.Array) -> np.ndarray:
    """Which blocks of a layer stay, booleans (rows, inputs)."""
    # All weights of a block share its fate, so that any of them tells it.
    n = cast(nmjax.Block1xN, leaf.pattern).n
    return np.asarray(split_blocks(mask, n, leaf.axes)[..., 0])
