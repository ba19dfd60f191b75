"""COCO 2017 with Faster R-CNN, or Mask R-CNN, over a ResNet-50 feature pyramid.

What this is for: the N:M paper's object detection and instance segmentation, whose code was never
released. SGD with momentum 0.9 at 0.02, weight decay 1e-4, 12 epochs of batches of 16. Unlike the
usual recipe, the backbone starts from scratch and its normalization is trained, the learning rate
follows a cosine instead of two steps, and images are scaled to a longer side of 1,024 pixels on a
square canvas, so that all have the same shape. Masks are stored, learned and compared at a quarter
of that resolution, whereas COCO's evaluation compares them at the original size of each image.
Average precision and time have not been measured with this code.

Run:
  tfds build coco/2017 --file_format=array_record     # once; needs TensorFlow and the network
  python -m experiments.train --task coco --pattern 2:4 --method sr_ste
  # Unpack annotations_trainval2017.zip of cocodataset.org in ~/tensorflow_datasets/coco first.
  python -m experiments.train --task coco --model mask_rcnn --pattern 2:4 --method sr_ste

Source: Ren et al., "Faster R-CNN", NeurIPS 2015; Lin et al., "Feature Pyramid Networks", CVPR 2017;
He et al., "Mask R-CNN", ICCV 2017.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from experiments.data.coco import CLASSES, CocoRecord, as_arrays, count_boxes, open_coco
from experiments.data.epochs import eval_epoch, steps_per_epoch, train_epoch
from experiments.models.detection.feature_pyramid import FeaturePyramid
from experiments.models.detection.mask_rcnn import MaskRCNN
from experiments.tasks.families.object_detection import object_detection_task
from experiments.tasks.options import DEFAULTS, Options, offers
from experiments.tasks.task import Batch, Compared, Recipe, Task

SIZE = 1024
MOST_OBJECTS = 100
_EVAL_BATCH = 8

RECIPE = Recipe(
    epochs=12,
    batch_size=16,
    learning_rate=0.02,
    # About 740 steps, for 118,287 training images.
    warmup_epochs=0.1,
    clip=10.0,
    weight_decay=1e-4,
)


@offers("faster_rcnn", "mask_rcnn")
def task(options: Options = DEFAULTS, *, size: int = SIZE) -> Task:
    """Makes the task of finding COCO's objects.

    Args:
      options: model, recipe and the like.
      size: side of the images in pixels; a multiple of 64.

    Raises:
      MissingDatasetError: if the data set has not been prepared, or its masks are missing.
      ValueError: the batch is larger than the data set, or the masks' file is damaged.
    """
    network, recipe = make_network(options.model), options.changed(RECIPE)
    # The small one first: a folder that is not prepared is found out before much is read.
    validation, train = (
        open_coco(split, options.data_dir, with_masks=network.with_masks)
        for split in ("validation", "train")
    )
    epochs = partial(
        train_epoch,
        train,
        partial(train_example, size=size),
        batch_size=recipe.batch_size,
        reading=options.reading,
    )
    evaluation = partial(
        eval_epoch,
        validation,
        partial(as_arrays, size=size, most=MOST_OBJECTS),
        batch_size=_EVAL_BATCH,
        reading=options.reading,
    )
    return object_detection_task(
        name="coco",
        model=network,
        image_shape=(size, size),
        train_batches=lambda seed, epoch: epochs(seed=seed, epoch=epoch),
        train_rows=epochs,
        eval_batches=evaluation,
        eval_rows=evaluation,
        steps_per_epoch=steps_per_epoch(train, recipe.batch_size),
        recipe=recipe,
        notes=(count_boxes(validation, MOST_OBJECTS),),
        compared=Compared(seeds=(0,)),
    )


def make_network(model: str) -> MaskRCNN:
    """Makes "faster_rcnn" or "mask_rcnn", over a ResNet-50 feature pyramid."""
    return MaskRCNN(pyramid=FeaturePyramid(), classes=CLASSES, with_masks=model == "mask_rcnn")


def train_example(record: CocoRecord, rng: np.random.Generator, size: int) -> Batch:
    """One image, mirrored every other time; crowds are left out as objects."""
    arrays = as_arrays(record, size, MOST_OBJECTS, mirrored=rng.random() < 0.5)
    # A crowd's box holds many objects. Class 0 makes it background, as padding is.
    is_crowd = arrays.pop("is_crowd")
    return {**arrays, "classes": np.where(is_crowd, 0, arrays["classes"]).astype(np.int32)}
