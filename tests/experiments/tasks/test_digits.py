"""The digits: split, disturbance, batches, recipe."""

import jax
import numpy as np
import pytest

from experiments.tasks import digits
from experiments.tasks.digits import (
    PAPER_TOTAL_PULL,
    PULL_FRACTION,
    disturb,
    lambda_for_pull,
    load_digits,
)
from experiments.tasks.options import Options


def test_split_is_stratified_and_nothing_is_in_both():
    from sklearn.datasets import load_digits as load

    data = load_digits()
    assert np.bincount(data.train_labels).tolist() == [80] * 10
    assert len(data.test_labels) == 2 * 997
    everything = load()
    # The darkest and the brightest pixel give the original gray values, 0 to 16, back.
    low, high = data.train_images.min(), data.train_images.max()
    train = np.rint(16 * (data.train_images - low) / (high - low)).astype(int)
    chosen = {image.tobytes() for image in train}
    originals = [image.astype(int).tobytes() for image in everything.images]
    assert len(chosen) == sum(original in chosen for original in originals) == 800
    left = np.bincount(everything.target) - 80
    assert (np.bincount(data.test_labels) == 2 * left).all()


def test_train_images_are_normalized():
    data = load_digits()
    assert abs(data.train_images.mean()) < 1e-5
    assert abs(data.train_images.std() - 1) < 1e-5
    assert data.train_images.min() == pytest.approx(data.background)


def test_disturbed_images_are_shifted_and_noisy():
    images = np.zeros((500, 8, 8, 1), np.float32)
    images[:, 4, 4] = 100
    out = disturb(images, -1.0, np.random.default_rng(0))
    peak = out.reshape(500, 64).argmax(axis=1)
    assert set(peak // 8) == set(peak % 8) == {3, 4, 5}
    assert out.dtype == np.float32
    inside = out[:, 1:-1, 1:-1][images[:, 1:-1, 1:-1] == 0]
    assert 0.4 < np.median(np.abs(inside)) / 0.6745 < 0.6


def test_batches_depend_on_seed_and_epoch_only():
    task = digits.task()

    def first(seed, epoch):
        return next(iter(task.train_batches(seed, epoch)))

    np.testing.assert_array_equal(first(1, 2)["image"], first(1, 2)["image"])
    for other in ((1, 3), (2, 2)):
        assert not np.array_equal(first(1, 2)["label"], first(*other)["label"])


def test_an_epoch_is_every_image_once():
    task = digits.task(Options(batch_size=50))
    batches = list(task.train_batches(0, 0))
    assert len(batches) == task.steps_per_epoch == 16
    assert np.bincount(np.concatenate([b["label"] for b in batches])).tolist() == [80] * 10


def test_evaluation_pads_the_last_batch_and_says_so():
    batches = list(digits.task().eval_batches())
    assert len({batch["image"].shape for batch in batches}) == 1
    assert sum(batch["valid"].sum() for batch in batches) == 2 * 997


def test_the_strength_gives_its_share_of_the_papers_pull():
    for epochs in (10, 60):
        task = digits.task(Options(epochs=epochs))
        steps = epochs * task.steps_per_epoch
        pull = task.recipe.lambda_w * steps * task.recipe.learning_rate / 2
        assert pull == pytest.approx(PULL_FRACTION * PAPER_TOTAL_PULL)
    assert lambda_for_pull(PAPER_TOTAL_PULL, 120 * 5004, 0.1) == pytest.approx(2e-4)


def test_model_and_loss_fit_together():
    task = digits.task()

    def loss(key):
        variables = dict(task.init(key))
        batch = next(iter(task.train_batches(0, 0)))
        return task.loss(variables.pop("params"), variables, batch, key)

    value, collections = jax.eval_shape(loss, jax.random.key(0))
    assert value.shape == ()
    assert set(collections) == {"batch_stats"}


def test_validation_holds_a_fifth_of_the_training_images_out_and_no_test_image(monkeypatch):
    for name in ("NOISE", "SHIFT_PIXELS"):
        monkeypatch.setattr(digits, name, 0)  # Then drawn images can be recognized.
    whole, tuning = (load_digits.__wrapped__(validation) for validation in (False, True))
    assert np.bincount(tuning.train_labels).tolist() == [64] * 10
    assert np.bincount(tuning.test_labels).tolist() == [8 * 16] * 10

    def grays(images):
        low, high = images.min(), images.max()
        scaled = np.rint(16 * (images - low) / (high - low)).astype(int)
        return {image.tobytes() for image in scaled}

    train, held_out = grays(tuning.train_images), grays(tuning.test_images)
    assert (len(train), len(held_out)) == (640, 160)
    assert train | held_out == grays(whole.train_images)
    assert not held_out & grays(whole.test_images)


def test_validation_trains_with_the_same_recipe_and_steps():
    task, whole = digits.task(Options(validation=True)), digits.task()
    assert task.identity != whole.identity
    assert (task.recipe, task.steps_per_epoch) == (whole.recipe, whole.steps_per_epoch)
    assert sum(1 for _ in task.train_batches(0, 0)) == task.steps_per_epoch
    assert sum(batch["valid"].sum() for batch in task.eval_batches()) == 1280
