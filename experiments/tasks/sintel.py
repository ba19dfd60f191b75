"""RAFT trained on FlyingChairs and evaluated on MPI Sintel, which it has never seen.

What this is for: testing whether what a sparse network learns transfers to other images. Training
is the same as in `experiments.tasks.flying_chairs`. Evaluation takes the 1,041 pairs of Sintel's
training scenes, clean rendering, padded at the bottom to a multiple of 8 pixels, and 32 iterations.
Error and time have not been measured with this code.

Run:
  python -m experiments.train --task sintel --data-dir FOLDER    # FlyingChairs_release/, Sintel/

Source: Butler et al., "A naturalistic open source movie for optical flow evaluation", ECCV 2012.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.data.epochs import eval_epoch
from experiments.data.flow_augment import Pair
from experiments.data.flow_folders import open_sintel
from experiments.tasks.flying_chairs import RECIPE, as_arrays, chairs_trained_task
from experiments.tasks.options import DEFAULTS, Options, offers
from experiments.tasks.task import Batch, Task

# As in RAFT's released evaluation on this data set.
EVAL_ITERATIONS = 32
_MULTIPLE = 8
_EVAL_BATCH = 4


@offers("raft")
def task(options: Options = DEFAULTS, *, rendering: Literal["clean", "final"] = "clean") -> Task:
    """Makes the task of estimating optical flow on Sintel after training on FlyingChairs.

    Args:
      options: model, recipe and the like; `data_dir` holds the unpacked data sets as
        FlyingChairs_release and Sintel.
      rendering: "clean" or "final", which adds blur and fog.

    Raises:
      MissingFlowError: a data set is missing or incomplete.
      ValueError: the batch is larger than the data set.
    """
    folder = options.data_dir or Path()
    pairs, reading = open_sintel(folder / "Sintel", rendering), options.reading
    return chairs_trained_task(
        "sintel",
        folder / "FlyingChairs_release",
        partial(eval_epoch, pairs, eval_example, batch_size=_EVAL_BATCH, reading=reading),
        recipe=options.changed(RECIPE),
        reading=reading,
        eval_iterations=EVAL_ITERATIONS,
    )


def eval_example(pair: Pair) -> Batch:
    """One pair, padded at the bottom and the right by its border; the flow is unknown there."""
    arrays = as_arrays(pair)
    height, width = arrays["known"].shape
    # Sintel's 436 rows are not a multiple of 8; its 1,024 columns are.
    missing = ((0, -height % _MULTIPLE), (0, -width % _MULTIPLE))
    # The border is repeated, as RAFT does: zeros would be an edge to match.
    return {
        name: np.pad(array, (*missing, (0, 0)), mode="edge")
        if name in ("first", "second")
        else np.pad(array, (*missing, (0, 0))[: array.ndim])
        for name, array in arrays.items()
    }
