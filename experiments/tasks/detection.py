"""Detection of digits in photographs, 64 x 64 pixels: boxes, classes and masks.

Up to four of scikit-learn's handwritten digits, enlarged and chalk-white, are pasted over darkened
crops of its two photographs and may overlap; see `experiments.data.scenes`. Every training scene is
new; test scenes use other digits and other parts of the photographs. The network is a small Mask
R-CNN, trained from scratch. Without learning, nothing is found and average precision is 0.

Metrics are COCO's: AP is the mean over overlaps from 0.5 to 0.95, and AP50 requires an overlap of
one half. There are only two seeds, one per core, so that a comparison fits into ten minutes.

Source: He et al., "Mask R-CNN", ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from experiments.data.scenes import CLASSES, draw_scene
from experiments.data.synthetic_flow import Split
from experiments.models.detection.feature_pyramid import FeaturePyramid
from experiments.models.detection.mask_rcnn import MaskRCNN
from experiments.models.images.resnet import BasicBlock
from experiments.tasks.families.object_detection import object_detection_task
from experiments.tasks.options import DEFAULTS, Options, offers
from experiments.tasks.task import Batch, Compared, Recipe, Task

SIZE = 64
TEST_SCENES = 128
STEPS_PER_EPOCH = 175
_EVAL_BATCH = 32

RECIPE = Recipe(
    epochs=12,
    batch_size=8,
    optimizer="adamw",
    learning_rate=3e-3,
    warmup_epochs=0.5,
    clip=5.0,
    weight_decay=1e-4,
)


@offers("mask_rcnn_tiny")
def task(options: Options = DEFAULTS) -> Task:
    """Makes the task of finding digits in photographs with a small Mask R-CNN."""
    recipe = options.changed(RECIPE)
    return object_detection_task(
        name="detection",
        model=tiny_mask_rcnn(),
        image_shape=(SIZE, SIZE),
        train_batches=lambda seed, epoch: _train_batches(seed, epoch, recipe.batch_size),
        eval_batches=lambda: iter(test_batches()),
        steps_per_epoch=STEPS_PER_EPOCH,
        recipe=recipe,
        baselines=(("without learning", 0.0),),
        notes=(_note(test_batches()),),
        compared=Compared(seeds=(0, 1)),
    )


def tiny_mask_rcnn() -> MaskRCNN:
    """A Mask R-CNN for digits in images of 64 pixels: two short stages, few proposals.

    The anchors are those of three levels, as large and as slim as the digits.
    """
    return MaskRCNN(
        pyramid=FeaturePyramid((1, 1), BasicBlock, width=32, channels=32),
        classes=CLASSES,
        with_masks=True,
        anchor_sizes=(20, 28, 32),
        # Digits are taller than wide, the 1 most of all.
        anchor_ratios=(1.0, 1.5, 2.2),
        canonical_side=64,
        hidden=128,
        mask_convs=2,
        mask_size=7,
        region_samples=64,
        # A quarter of them may be objects, which makes room for all four digits.
        box_samples=16,
        before=(48, 48),
        after=(32, 24),
        candidates=48,
        detections=12,
    )


def draw_batch(rng: np.random.Generator, count: int, split: Split) -> Batch:
    """Draws scenes, with everything that the task's losses ask for."""
    scenes = [draw_scene(rng, SIZE, split) for _ in range(count)]
    return {
        "image": np.stack([2 * scene.image - 1 for scene in scenes]),
        "boxes": np.stack([scene.boxes for scene in scenes]),
        "classes": np.stack([scene.classes for scene in scenes]),
        "masks": np.stack([scene.masks for scene in scenes]),
    }


def _train_batches(seed: int, epoch: int, batch_size: int) -> Iterator[Batch]:
    # There is no fixed set of scenes: an epoch is a number of new ones.
    rng = np.random.default_rng((seed, epoch))
    for _ in range(STEPS_PER_EPOCH):
        yield draw_batch(rng, batch_size, "train")


@lru_cache(maxsize=1)
def test_batches() -> list[Batch]:
    """The test set in batches of one size; the result is cached."""
    # No seed of a run makes this generator.
    rng = np.random.default_rng(2**32)
    valid = np.ones(_EVAL_BATCH, np.int32)
    return [
        {**draw_batch(rng, _EVAL_BATCH, "test"), "valid": valid}
        for _ in range(TEST_SCENES // _EVAL_BATCH)
    ]


def _note(batches: list[Batch]) -> str:
    counts = np.concatenate([(batch["classes"] > 0).sum(axis=1) for batch in batches])
    return (
        f"{len(counts)} test scenes with {counts.sum()} digits, {(counts == 0).sum()} scenes "
        "without any."
    )
