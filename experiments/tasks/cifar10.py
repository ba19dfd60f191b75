"""CIFAR-10 with a ResNet: 50,000 training and 10,000 test images of 32 x 32, ten classes.

What this is for: natural images at a size that trains without a cluster. It reproduces no
particular figure. The recipe is the common one for small images: SGD with momentum 0.9, cosine,
weight decay 5e-4, shift by up to four pixels and mirror. Accuracy and time have not been
measured with this code.

Run:
  tfds build cifar10 --file_format=array_record     # once; needs TensorFlow and the network
  python -m experiments.train --task cifar10 --model resnet18 --pattern 2:4 --method sr_ste
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.data import images
from experiments.data.epochs import Reading, eval_epoch, steps_per_epoch, train_epoch
from experiments.data.records import Record, decode, open_images
from experiments.models.images.networks import make_image_network
from experiments.tasks.families.classification import classification_task
from experiments.tasks.task import Batch, Recipe, Task

# Of the training images, each channel, scaled to [0, 1].
_MEAN = (0.4914, 0.4822, 0.4465)
_STD = (0.2470, 0.2435, 0.2616)

_READING = Reading()
RECIPE = Recipe(epochs=200, batch_size=128, learning_rate=0.1, warmup_epochs=5, weight_decay=5e-4)


def cifar10_task(
    model: str = "resnet18",
    *,
    recipe: Recipe = RECIPE,
    data_dir: str | Path | None = None,
    dtype: Any = jnp.float32,
    keep_dense: tuple[str, ...] = ("^stem/", "^head/"),
    reading: Reading = _READING,
) -> Task:
    """Makes the CIFAR-10 task.

    Args:
      model: one of `experiments.models.images.networks.IMAGE_NETWORKS`; gets the stem for small
        images.
      recipe: hyper-parameters; its batch size is that of the batches.
      data_dir: folder of prepared data sets; see `open_images`.
      dtype: the network computes in.
      keep_dense: path rules of layers that stay dense. The stem cannot be sparse: it sums over
        three channels, which no group of four or more fits into.
      reading: threads and processes that read.

    Raises:
      MissingDatasetError: if the data set has not been prepared.
      ValueError: if there is no such model, or the batch is larger than the data set.
    """
    train = open_images("cifar10", "train", name_feature="id", data_dir=data_dir)
    test = open_images("cifar10", "test", name_feature="id", data_dir=data_dir)
    epochs = partial(
        train_epoch, train, train_example, batch_size=recipe.batch_size, reading=reading
    )
    evaluation = partial(
        eval_epoch, test, eval_example, batch_size=recipe.batch_size, reading=reading
    )
    return classification_task(
        name="cifar10",
        model=make_image_network(model, 10, stem="cifar", dtype=dtype),
        input_shape=(32, 32, 3),
        train_batches=lambda seed, epoch: epochs(seed=seed, epoch=epoch),
        train_rows=epochs,
        eval_batches=evaluation,
        eval_rows=evaluation,
        steps_per_epoch=steps_per_epoch(train, recipe.batch_size),
        recipe=recipe,
        keep_dense=keep_dense,
    )


def train_example(record: Record, rng: np.random.Generator) -> Batch:
    """Decodes, shifts, mirrors and normalises one image."""
    pixels = images.random_shift(rng, np.asarray(decode(record)), padding=4)
    pixels = images.random_flip(rng, pixels)
    return {
        "image": images.normalise(pixels, _MEAN, _STD),
        "label": np.asarray(record["label"], np.int32),
    }


def eval_example(record: Record) -> Batch:
    """Decodes and normalises one image."""
    return {
        "image": images.normalise(np.asarray(decode(record)), _MEAN, _STD),
        "label": np.asarray(record["label"], np.int32),
    }
