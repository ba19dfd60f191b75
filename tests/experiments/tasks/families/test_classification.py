"""What image classification tasks share, against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tasks.families.classification import (
    classification_sums,
    classification_task,
    cross_entropy,
)
from experiments.tasks.task import Recipe


class Small(nn.Module):
    """With running statistics, a random stream and a collection that is only read."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(x.reshape(len(x), -1))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        self.variable("constants", "scale", lambda: jnp.float32(2.0))
        return nn.Dense(3)(x)


def make_task(model, **recipe):
    return classification_task(
        name="small",
        model=model,
        input_shape=(2, 2, 1),
        train_batches=lambda seed, epoch: iter(()),
        eval_batches=lambda: iter(()),
        steps_per_epoch=1,
        recipe=Recipe(**recipe),
        keep_dense=("^Dense_0/",),
    )


BATCH = {
    "image": np.random.default_rng(0).standard_normal((6, 2, 2, 1)).astype(np.float32),
    "label": np.arange(6, dtype=np.int32) % 3,
    "valid": np.array([1, 1, 1, 1, 0, 0], np.int32),
}

compiled_sums = jax.jit(classification_sums)


def test_smoothing_spreads_a_share_of_the_target_over_all_classes():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((5, 4)).astype(np.float32), np.array([0, 1, 2, 3, 0])
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    own = -logs[np.arange(5), labels]
    for share in (0.0, 0.1, 1.0):
        expected = (1 - share) * own - share * logs.mean(axis=1)
        np.testing.assert_allclose(
            cross_entropy(logits, labels, smoothing=share), expected, rtol=1e-5
        )


@settings(max_examples=4, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    classes=st.integers(1, 6),
    share=st.floats(0, 1),
)
def test_any_number_of_axes_may_come_before_the_classes(shape, classes, share):
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((*shape, classes))).astype(np.float32)
    labels = rng.integers(0, classes, shape)
    wanted = (1 - share) * np.eye(classes)[labels] + share / classes
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    found = cross_entropy(logits, jnp.asarray(labels), smoothing=share)
    assert found.shape == tuple(shape)
    np.testing.assert_allclose(found, -(wanted * logs).sum(axis=-1), rtol=1e-4, atol=1e-5)


def test_the_recipes_smoothing_acts_in_training_and_not_in_evaluation():
    plain, smooth = make_task(Small()), make_task(Small(), label_smoothing=0.5)
    variables = jax.jit(plain.init)(jax.random.key(0))
    arguments = variables.pop("params"), variables, BATCH
    losses = [jax.jit(task.loss)(*arguments, jax.random.key(1))[0] for task in (plain, smooth)]
    assert losses[0] != losses[1]
    sums = [jax.jit(task.evaluate)(*arguments)["loss"] for task in (plain, smooth)]
    assert sums[0] == sums[1]


def test_loss_updates_statistics_and_keeps_other_collections():
    task = make_task(Small())
    collections = jax.jit(task.init)(jax.random.key(0))
    params = collections.pop("params")
    assert set(collections) == {"batch_stats", "constants"}
    compiled = jax.jit(task.loss)
    loss, updated = compiled(params, collections, BATCH, jax.random.key(1))
    assert loss.shape == ()
    assert loss.dtype == jnp.float32
    assert jax.tree.structure(updated) == jax.tree.structure(collections)
    mean = BATCH["image"].reshape(6, -1).mean(axis=0)
    np.testing.assert_allclose(
        updated["batch_stats"]["BatchNorm_0"]["mean"], 0.01 * mean, rtol=1e-4, atol=1e-6
    )
    other, _ = compiled(params, collections, BATCH, jax.random.key(2))
    assert loss != other  # dropout
    assert task.keep_dense == ("^Dense_0/",)


def test_a_model_without_collections():
    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(x.reshape(len(x), -1))

    task = make_task(Bare())
    variables = jax.jit(task.init)(jax.random.key(0))
    params = variables.pop("params")
    loss, updated = jax.jit(task.loss)(params, variables, BATCH, jax.random.key(1))
    assert updated == {}
    assert np.isfinite(loss)


def test_evaluation_does_not_depend_on_padding():
    task = make_task(Small())
    collections = jax.jit(task.init)(jax.random.key(0))
    params = collections.pop("params")
    evaluate = jax.jit(task.evaluate)
    padded = evaluate(params, collections, BATCH)
    short = {name: values[:4] for name, values in BATCH.items()}
    for name, value in evaluate(params, collections, short).items():
        np.testing.assert_allclose(padded[name], value, rtol=1e-6)
    assert padded["count"] == 4
    broken = {**BATCH, "image": BATCH["image"].copy()}
    broken["image"][5] = np.nan
    assert evaluate(params, collections, broken)["loss"] == padded["loss"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cross_entropy_is_computed_in_float32(dtype):
    logits = jax.random.normal(jax.random.key(0), (5, 7)).astype(dtype)
    labels = np.array([0, 6, 3, 3, 1])
    exact = np.asarray(logits, np.float64)
    expected = np.log(np.exp(exact).sum(axis=-1)) - exact[np.arange(5), labels]
    losses = cross_entropy(logits, labels)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_top1_agrees_with_argmax_and_top5_with_sorting():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 12, (200, 30)).astype(np.float32)  # with many ties
    labels = rng.integers(0, 30, 200)
    sums = compiled_sums(logits, labels, np.ones(200))
    assert sums["accuracy"] == (logits.argmax(axis=-1) == labels).sum()
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :5]
    assert sums["top5"] == (best == labels[:, None]).any(axis=-1).sum()
    assert "top5" not in compiled_sums(logits[:, :10], labels % 10, np.ones(200))


def test_not_a_number_is_never_right():
    for logits in ([[np.nan, 0.0, 1.0]], [[np.nan] * 3], [[0.0, 1.0, np.nan]]):
        for label in range(3):
            sums = compiled_sums(np.array(logits), np.array([label]), np.ones(1))
            assert sums["accuracy"] == 0
            assert sums["count"] == 1
