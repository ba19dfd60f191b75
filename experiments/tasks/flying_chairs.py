"""Optical flow on FlyingChairs with RAFT, as in the N:M paper's released code.

What this is for: the paper's optical flow result, 2:4 sparse RAFT with an end-point error of 0.88
on the validation set (its README). AdamW at 4e-4 with weight decay 1e-4, linear decay after a
warm-up over 5% of the steps, 200,000 steps of 4 pairs, crops of 368 x 496, 12 iterations, gradient
norm clipped to 1 after the sparse-refined term is added. Evaluation takes 24 iterations. Unlike in
the released code, the stems and the convolution over the flow stay dense, because a group of four
does not fit into three or two channels; colors are not augmented; and the incomplete last batch of
an epoch is dropped. Error and time have not been measured with this code.

Run:
  python -m experiments.train --task flying_chairs --data-dir FlyingChairs_release --method sr_ste

Source: Dosovitskiy et al., "FlowNet", ICCV 2015; Teed and Deng, "RAFT", ECCV 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from experiments.data.epochs import Reading, eval_epoch, steps_per_epoch, train_epoch
from experiments.data.flow_augment import Pair, augment
from experiments.data.flow_files import is_known
from experiments.data.flow_folders import open_chairs
from experiments.models.flow.raft import Raft
from experiments.tasks.families.optical_flow import optical_flow_task
from experiments.tasks.options import DEFAULTS, Options, offers
from experiments.tasks.task import Batch, Compared, Recipe, Task

CROP = (368, 496)
# As in RAFT's released evaluation on this data set.
EVAL_ITERATIONS = 24
_EVAL_BATCH = 8

# 36 epochs of 5,558 steps (22,232 training pairs) are 200,000 steps.
RECIPE = Recipe(
    epochs=36,
    batch_size=4,
    optimizer="adamw",
    learning_rate=4e-4,
    schedule="linear",
    # 5 % of the epochs.
    warmup_epochs=1.8,
    clip=1.0,
    weight_decay=1e-4,
)


@offers("raft")
def task(options: Options = DEFAULTS) -> Task:
    """Makes the task of estimating optical flow on FlyingChairs.

    Args:
      options: model, recipe and the like; `data_dir` is the unpacked FlyingChairs_release.

    Raises:
      MissingFlowError: the data set is missing or incomplete.
      ValueError: the batch is larger than the data set.
    """
    folder = options.data_dir or Path("FlyingChairs_release")
    validation, reading = open_chairs(folder, "validation"), options.reading
    return chairs_trained_task(
        "flying_chairs",
        folder,
        partial(eval_epoch, validation, eval_example, batch_size=_EVAL_BATCH, reading=reading),
        recipe=options.changed(RECIPE),
        reading=reading,
        eval_iterations=EVAL_ITERATIONS,
    )


def chairs_trained_task(
    name: str,
    folder: Path,
    eval_batches: partial[Iterator[Batch]],
    *,
    recipe: Recipe,
    reading: Reading,
    eval_iterations: int,
) -> Task:
    """Makes a task that trains on FlyingChairs and is evaluated on anything.

    Args:
      name: name of the task.
      folder: the unpacked FlyingChairs_release.
      eval_batches: see `optical_flow_task`; takes "rows_of" too, as `Task.eval_rows` does.
      recipe: hyper-parameters.
      reading: threads and processes that read.
      eval_iterations: the network's iterations in evaluation.
    """
    train = open_chairs(folder, "train")
    epochs = partial(
        train_epoch, train, train_example, batch_size=recipe.batch_size, reading=reading
    )
    return optical_flow_task(
        name=name,
        model=Raft(),
        eval_iterations=eval_iterations,
        train_batches=lambda seed, epoch: epochs(seed=seed, epoch=epoch),
        train_rows=epochs,
        eval_batches=eval_batches,
        eval_rows=eval_batches,
        steps_per_epoch=steps_per_epoch(train, recipe.batch_size),
        recipe=recipe,
        compared=Compared(seeds=(0,)),
    )


def train_example(pair: Pair, rng: np.random.Generator) -> Batch:
    """Augments one pair."""
    return as_arrays(augment(rng, pair, *CROP))


def eval_example(pair: Pair) -> Batch:
    """One pair as it is."""
    return as_arrays(pair)


def as_arrays(pair: Pair) -> Batch:
    """A pair in the form that `optical_flow_task` asks for, without an axis for the batch."""
    first, second, flow = pair
    return {
        # A Python number would make float64 of uint8, which takes twice the memory.
        "first": (first / np.float32(127.5) - 1).astype(np.float32),
        "second": (second / np.float32(127.5) - 1).astype(np.float32),
        "flow": np.ascontiguousarray(flow, np.float32),
        "known": is_known(flow).astype(np.float32),
    }
