"""A task that compiles and trains in a moment: a small multilayer perceptron on four blobs."""

import dataclasses

import flax.linen as nn
import numpy as np

from experiments.tasks.families.classification import classification_task
from experiments.tasks.task import Recipe

STEPS = 5
BATCH = 8


class Perceptron(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        x = nn.Dense(self.width, name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
        x = nn.relu(nn.Dense(self.width, name="middle")(nn.relu(x)))
        return nn.Dense(4, name="head")(nn.relu(nn.Dense(self.width, name="last")(x)))


def draw(rng, count):
    labels = rng.integers(0, 4, count).astype(np.int32)
    images = rng.standard_normal((count, 2, 2, 1)).astype(np.float32)
    images.reshape(count, 4)[np.arange(count), labels] += 2
    return {"image": images, "label": labels}


def tiny_task(*, epochs=4, learning_rate=0.05, scale=1.0, width=16, **recipe):
    """`scale` multiplies the training images: infinity makes the loss NaN."""

    def train_batches(seed, epoch):
        rng = np.random.default_rng((seed, epoch))
        for _ in range(STEPS):
            batch = draw(rng, BATCH)
            yield {**batch, "image": batch["image"] * np.float32(scale)}

    def eval_batches():
        rng = np.random.default_rng(99)
        for valid in (32, 20):
            yield {**draw(rng, 32), "valid": (np.arange(32) < valid).astype(np.float32)}

    return classification_task(
        name="digits",
        model=Perceptron(width),
        input_shape=(2, 2, 1),
        train_batches=train_batches,
        eval_batches=eval_batches,
        steps_per_epoch=STEPS,
        recipe=Recipe(
            epochs=epochs,
            batch_size=BATCH,
            learning_rate=learning_rate,
            warmup_epochs=0.4,
            **{"lambda_w": 0.01, "lambda_decoupled": 0.5, **recipe},
        ),
        keep_dense=("^stem/", "^head/"),
    )


def with_predictions(task):
    """The task, which also predicts logits and counts right answers itself, as "counted"."""

    def predict(params, collections, batch):
        network = Perceptron(params["middle"]["bias"].shape[0])
        return network.apply({"params": params, **collections}, batch["image"], train=False)

    def score(batches, predictions):
        right = [
            (logits.argmax(axis=1) == batch["label"])[batch["valid"] == 1]
            for batch, logits in zip(batches, predictions, strict=True)
        ]
        assert batches[0].keys() == {"label", "valid"}
        return {"counted": np.concatenate(right).mean()}

    return dataclasses.replace(task, predict=predict, score=score, scored_by=("label",))
