"""CIFAR-10 with a ResNet: 50,000 training and 10,000 test images of 32 x 32, ten classes.

What this is for: natural images at a size that trains without a cluster. It does not reproduce a
particular result. The recipe is the usual one for small images: SGD with momentum 0.9, cosine
decay, weight decay 5e-4, random shifts of up to four pixels and horizontal flips. Accuracy and
time have not been measured with this code.

Run:
  tfds build cifar10 --file_format=array_record     # once; needs TensorFlow and the network
  python -m experiments.train --task cifar10 --model resnet18 --pattern 2:4 --method sr_ste
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.data import images
from experiments.data.epochs import eval_epoch, steps_per_epoch, train_epoch
from experiments.data.records import Record, decode, open_images
from experiments.models.images.networks import IMAGE_NETWORKS, dense_layers, make_image_network
from experiments.tasks.families.classification import classification_task
from experiments.tasks.options import BOTH_DTYPES, DEFAULTS, Options, offers
from experiments.tasks.task import Batch, Recipe, Task

# Of the training images, each channel, scaled to [0, 1].
_MEAN = (0.4914, 0.4822, 0.4465)
_STD = (0.2470, 0.2435, 0.2616)

RECIPE = Recipe(epochs=200, batch_size=128, learning_rate=0.1, warmup_epochs=5, weight_decay=5e-4)


@offers(*IMAGE_NETWORKS, default="resnet18", dtypes=BOTH_DTYPES)
def task(options: Options = DEFAULTS) -> Task:
    """Makes the CIFAR-10 task. The networks have the stem for small images.

    The stem stays dense: it sums over three channels, too few for a group of four or more.

    Raises:
      MissingDatasetError: if the data set has not been prepared.
      ValueError: if the batch is larger than the data set.
    """
    recipe = options.changed(RECIPE)
    batches: dict[str, Any] = {"batch_size": recipe.batch_size, "reading": options.reading}
    train = open_images("cifar10", "train", name_feature="id", data_dir=options.data_dir)
    test = open_images("cifar10", "test", name_feature="id", data_dir=options.data_dir)
    epochs = partial(train_epoch, train, train_example, **batches)
    evaluation = partial(eval_epoch, test, eval_example, **batches)
    return classification_task(
        name="cifar10",
        model=make_image_network(options.model, 10, stem="cifar", dtype=jnp.dtype(options.dtype)),
        input_shape=(32, 32, 3),
        # `train_epoch` takes both by keyword only.
        train_batches=lambda seed, epoch: epochs(seed=seed, epoch=epoch),
        train_rows=epochs,
        eval_batches=evaluation,
        eval_rows=evaluation,
        steps_per_epoch=steps_per_epoch(train, recipe.batch_size),
        recipe=recipe,
        keep_dense=dense_layers(options.model, blocks=options.for_blocks),
    )


def train_example(record: Record, rng: np.random.Generator) -> Batch:
    """Decodes, shifts, mirrors and normalizes one image."""
    pixels = images.random_shift(rng, np.asarray(decode(record)), padding=4)
    pixels = images.random_flip(rng, pixels)
    return {
        "image": images.normalize(pixels, _MEAN, _STD),
        "label": np.asarray(record["label"], np.int32),
    }


def eval_example(record: Record) -> Batch:
    """Decodes and normalizes one image."""
    return {
        "image": images.normalize(np.asarray(decode(record)), _MEAN, _STD),
        "label": np.asarray(record["label"], np.int32),
    }
