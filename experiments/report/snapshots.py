"""What a comparison keeps to show: images of the task, kernels, blocks and answers of networks."""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np

import nmjax
from experiments.json_files import Numbers
from experiments.tasks.task import Shown, Task
from experiments.training.step import Job, Programs, RunState
from nmjax.masks.blocks import split_blocks


def example_images(task: Task, count: int = 12) -> Numbers:
    """The first test images and their labels; empty unless they are small and gray."""
    batch = next(iter(task.eval_batches()))
    images = batch.get("image", np.zeros(0))
    if images.ndim != 4 or images.shape[-1] != 1 or images.shape[1] > 32:
        return {}
    return {"images": images[:count, :, :, 0], "labels": batch["label"][:count]}


def shown(job: Job, programs: Programs, state: RunState) -> list[Shown]:
    """What the first seed's network does with the task's examples; empty if it shows none."""
    if job.task.show is None:
        return []
    network = jax.device_get((programs.forward(state.train), state.train.collections))
    return job.task.show(*_first_seed(state, network))


def kernel_shapes(job: Job, state: RunState) -> Numbers:
    """Which taps the first seed keeps in the second layer of 3x3 kernels, or in the only one.

    For each (input, output) channel the nine taps are text in row order, such as "010110010".
    Empty without such a layer.
    """
    masks = nmjax.compute_masks(_first_seed(state, state.train.params), job.plan)
    wide = [name for name, mask in masks.items() if mask.ndim == 4 and mask.shape[:2] == (3, 3)]
    if not wide:
        return {}
    layer = wide[min(1, len(wide) - 1)]
    taps = np.asarray(masks[layer]).astype(int)
    kernels = taps.reshape(9, *taps.shape[2:]).transpose(1, 2, 0)
    return {"layer": layer, "kernels": [["".join(map(str, k)) for k in row] for row in kernels]}


def block_masks(job: Job, state: RunState) -> Numbers:
    """The blocks that the first seed's largest layer keeps, for methods that remember masks.

    Each row of blocks is text with a digit for each input channel, such as "0110".
    """
    masks = _first_seed(state, state.topology.used)
    layer = max(reversed(list(masks)), key=lambda name: masks[name].size)
    leaf = job.plan[layer]
    blocks = split_blocks(masks[layer], cast(nmjax.Block1xN, leaf.pattern).n, leaf.axes)
    # The weights of a block are kept or dropped together, so the first one stands for all.
    kept = np.asarray(blocks[..., 0]).astype(int)
    return {"layer": layer, "rows": ["".join(map(str, row)) for row in kept]}


def _first_seed(state: RunState, tree: Any) -> Any:
    """The part of the first seed, where several train together."""
    return jax.tree.map(lambda leaf: leaf[0], tree) if np.ndim(state.train.step) else tree
