"""Optical flow between two photographs' layers, 64 x 64 pixels: generated, with exact truth.

A background and one or two blobs, cut out of scikit-learn's two photographs, move by affine maps
of their own; see `experiments.data.synthetic_flow`. Every training pair is new, and test pairs are
cut out of another part of the photographs. The network is a small RAFT whose features are
centred and scaled before they are correlated. The baseline is to say that nothing moves.

The recipe is that of RAFT's first stage on FlyingChairs (AdamW, gradient norm clipped to 1 after
the sparse-refined term of 2e-4 is added, linear decay after a warm-up over 5 % of the steps), with
a higher learning rate for a smaller network. Two seeds instead of more: one a core is what ten
minutes allow.

Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from experiments.data.synthetic_flow import Split, draw_pair
from experiments.models.raft import tiny_raft
from experiments.tasks.optical_flow import no_motion_error, optical_flow_task
from experiments.tasks.task import Batch, Compared, Recipe, Task

SIZE = 64
TEST_PAIRS = 96
STEPS_PER_EPOCH = 50
_EVAL_BATCH = 32

RECIPE = Recipe(
    epochs=14,
    batch_size=6,
    optimizer="adamw",
    learning_rate=6e-3,
    schedule="linear",
    warmup_epochs=0.7,
    clip=1.0,
    weight_decay=1e-4,
)


def flow_task(*, recipe: Recipe = RECIPE) -> Task:
    """Makes the task of estimating generated optical flow with a small RAFT.

    Args:
      recipe: hyper-parameters; an epoch has `STEPS_PER_EPOCH` steps.
    """
    return optical_flow_task(
        name="flow",
        model=tiny_raft(),
        train_batches=lambda seed, epoch: _train_batches(seed, epoch, recipe.batch_size),
        eval_batches=lambda: iter(test_batches()),
        steps_per_epoch=STEPS_PER_EPOCH,
        recipe=recipe,
        baselines=(("without motion", no_motion_error(test_batches())),),
        compared=Compared(seeds=(0, 1)),
    )


def draw_batch(rng: np.random.Generator, count: int, split: Split) -> Batch:
    """Draws pairs of images, with everything that the task's loss asks for."""
    pairs = [draw_pair(rng, SIZE, split) for _ in range(count)]
    return {
        "first": np.stack([2 * pair.first - 1 for pair in pairs]),
        "second": np.stack([2 * pair.second - 1 for pair in pairs]),
        "flow": np.stack([pair.flow for pair in pairs]),
        "known": np.ones((count, SIZE, SIZE), np.float32),
    }


def _train_batches(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    rng = np.random.default_rng((seed, epoch))
    for _ in range(STEPS_PER_EPOCH):
        yield draw_batch(rng, batch_size, "train")


@lru_cache(maxsize=1)
def test_batches() -> list[Batch]:
    """The test set in batches of one size, the same at every call."""
    # No seed of a run makes this generator.
    rng = np.random.default_rng(2**32)
    return [
        {**draw_batch(rng, _EVAL_BATCH, "test"), "valid": np.ones(_EVAL_BATCH, np.float32)}
        for _ in range(TEST_PAIRS // _EVAL_BATCH)
    ]
