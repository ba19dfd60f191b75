"""Optical flow of generated image pairs, 64 x 64 pixels, with exact ground truth.

A background and one or two blobs, cropped from scikit-learn's two photographs, each move by their
own affine map; see `experiments.data.synthetic_flow`. A thousand training pairs are drawn once, the
same for every seed of a run, and flipped horizontally and vertically at random; test pairs come
from another part of the photographs. The network is a small RAFT that centers and scales its
features before it correlates them. The baseline predicts that nothing moves.

The recipe is that of RAFT's first stage on FlyingChairs (AdamW, gradient norm clipped to 1 after
the sparse-refined term of 2e-4 is added, linear decay after a warm-up over 5% of the steps), with
a higher learning rate for a smaller network: 2e-3. Twice that is too high: in a trial the error
stayed at two thirds of the baseline's until the rate had decayed. There are only two seeds, one per
core, so that a comparison fits into ten minutes.

Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np

from experiments.data.epochs import eval_epoch, steps_per_epoch, train_epoch
from experiments.data.flow_augment import Pair, mirror, turn_over
from experiments.data.images import Pixels
from experiments.data.synthetic_flow import Split, draw_pair
from experiments.models.flow.raft import tiny_raft
from experiments.tasks.families.optical_flow import no_motion_error, optical_flow_task
from experiments.tasks.flying_chairs import as_arrays
from experiments.tasks.options import DEFAULTS, Options, offers
from experiments.tasks.task import Batch, Compared, Recipe, Task

SIZE = 64
TRAIN_PAIRS = 1000
TEST_PAIRS = 96
_EVAL_BATCH = 32

RECIPE = Recipe(
    epochs=5,
    batch_size=8,
    optimizer="adamw",
    learning_rate=2e-3,
    schedule="linear",
    warmup_epochs=0.25,
    clip=1.0,
    weight_decay=1e-4,
)


@offers("raft_tiny")
def task(options: Options = DEFAULTS) -> Task:
    """Makes the task of estimating generated optical flow with a small RAFT.

    Raises:
      ValueError: the batch is larger than the training set.
    """
    recipe = options.changed(RECIPE)
    # Test pairs are drawn at once, because the baseline needs them.
    tests = partial(eval_epoch, drawn_pairs("test", TEST_PAIRS), as_arrays, batch_size=_EVAL_BATCH)
    return optical_flow_task(
        name="flow",
        model=tiny_raft(),
        # Drawn only once, when training begins.
        train_batches=lambda seed, epoch: train_epoch(
            drawn_pairs("train", TRAIN_PAIRS),
            train_example,
            batch_size=recipe.batch_size,
            seed=seed,
            epoch=epoch,
        ),
        eval_batches=tests,
        # A range has the right length without drawing the pairs.
        steps_per_epoch=steps_per_epoch(range(TRAIN_PAIRS), recipe.batch_size),
        recipe=recipe,
        baselines=(("without motion", no_motion_error(tests())),),
        compared=Compared(seeds=(0, 1)),
    )


@lru_cache(maxsize=2)
def drawn_pairs(split: Split, count: int) -> tuple[Pair, ...]:
    """The first pairs of a split, as uint8 like files on disk; always the same ones."""
    # Not the run's seed: all runs share their pairs, as with a data set on disk.
    rng = np.random.default_rng(int(split == "test"))
    pairs = (draw_pair(rng, SIZE, split) for _ in range(count))
    return tuple((_pixels(pair.first), _pixels(pair.second), pair.flow) for pair in pairs)


def train_example(pair: Pair, rng: np.random.Generator) -> Batch:
    """Flips a pair horizontally and vertically, each at random."""
    for change in (mirror, turn_over):
        if rng.random() < 0.5:
            pair = change(pair)
    return as_arrays(pair)


def _pixels(image: np.ndarray) -> Pixels:
    """From [0, 1] to [0, 255]."""
    pixels: Pixels = np.rint(255 * image).astype(np.uint8)
    return pixels
