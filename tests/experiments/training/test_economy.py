"""Accumulated gradients, bfloat16 and remat, with sparse training."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax
from experiments.tasks.families.bfloat16 import in_bfloat16
from experiments.tasks.families.classification import classification_task
from experiments.training.economy import in_auto_axes, with_remat
from experiments.training.loop import begin, train
from experiments.training.methods import METHODS, optimizer
from experiments.training.step import Job, make_programs, plan_of
from nmjax.trees.leaves import named_leaves
from tests.experiments.tiny import BATCH, tiny_task


class Plain(nn.Module):
    """Without batch statistics, so that a batch is the mean of its parts."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(16, name="stem")(x.reshape(len(x), -1)))
        return nn.Dense(4, name="head")(nn.relu(nn.Dense(16, name="middle")(x)))


def plain_task():
    task = tiny_task(epochs=2)
    return classification_task(
        name="plain",
        model=Plain(),
        input_shape=(2, 2, 1),
        train_batches=task.train_batches,
        eval_batches=task.eval_batches,
        steps_per_epoch=task.steps_per_epoch,
        recipe=task.recipe,
        keep_dense=task.keep_dense,
    )


def make_job(task, method="sr_ste", accumulate=1):
    plan = plan_of(task, "1x4@0.75" if METHODS[method].blocks_only else "1:4")
    built = METHODS[method].build(plan, task.recipe, task.steps_per_epoch)
    return Job(task, plan, built, accumulate)


def last(job):
    *_, report = train(job)
    return report, jax.device_get(report.state.train)


def assert_close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "method", ["sr_ste", pytest.param("one_shot", marks=slow), pytest.param("subp", marks=slow)]
)
def test_a_batch_in_parts_is_the_batch(method):
    task = plain_task()
    whole, expected = last(make_job(task, method))
    parts, got = last(make_job(task, method, accumulate=4))
    assert_close(got.params, expected.params, rtol=1e-4, atol=1e-6)
    assert_close(got.sparse, expected.sparse)
    for name, mask in whole.state.topology.epoch.items():
        np.testing.assert_array_equal(parts.state.topology.epoch[name], mask)
    np.testing.assert_allclose(parts.train_loss, whole.train_loss, rtol=1e-5)
    np.testing.assert_array_equal(parts.sad_epoch, whole.sad_epoch)
    assert got.step == expected.step


@slow
def test_parts_with_batch_statistics_follow_each_other():
    """One step, part by part by hand: statistics of each, the mean gradient, one update."""
    task, parts = tiny_task(epochs=1), 2
    job = make_job(task, accumulate=parts)
    programs = make_programs(job)
    # Copies: the step gives up the memory of what it is given.
    state = jax.device_get(begin(programs, (0,), 0.3).train)
    batch = next(iter(task.train_batches(0, 0)))
    got = programs.step(state, batch)
    collections, grads = state.collections, []
    for part in range(parts):
        rows = {name: values[part::parts] for name, values in batch.items()}

        def loss(params, collections=collections, rows=rows):
            sparse = nmjax.sparsify(params, job.plan)
            return task.loss(sparse, collections, rows, jax.random.key(0))

        gradient, collections = jax.grad(loss, has_aux=True)(state.params)
        grads.append(gradient)
    mean = jax.tree.map(lambda *g: sum(g) / parts, *grads)
    tx = optimizer(job.method, task.recipe, task.steps_per_epoch, 0.3)
    updates, _ = tx.update(mean, tx.init(state.params), state.params)
    expected = optax.apply_updates(state.params, updates)
    assert_close(got.params, expected, rtol=1e-4, atol=1e-6)
    assert_close(got.collections, collections, rtol=1e-5, atol=1e-6)


@slow
def test_the_pull_is_added_once_however_many_parts():
    job = make_job(plain_task(), accumulate=4)
    programs = make_programs(job)
    state = jax.device_get(begin(programs, (0,), 0.0).train)
    # Two steps in: the first has a learning rate of zero.
    state = jax.device_get(programs.step(state, next(iter(job.task.train_batches(0, 0)))))
    batch = next(iter(job.task.train_batches(0, 1)))
    without, pulled = (
        programs.step(state._replace(lambda_w=np.float32(strength)), batch).params
        for strength in (0.0, 0.5)
    )
    w = state.params["middle"]["kernel"]
    out = ~nmjax.compute_masks(state.params, job.plan)["middle/kernel"]
    change = pulled["middle"]["kernel"] - without["middle"]["kernel"]
    rate = 0.05 / 2  # the second of two steps of warm-up
    np.testing.assert_allclose(change, -rate * 0.5 * out * w, atol=1e-6)


def test_in_bfloat16_only_the_network_is_narrow():
    task = tiny_task(epochs=2)
    job = make_job(in_bfloat16(task))
    report, state = last(job)
    for name, leaf in named_leaves((state.params, state.opt_state, state.collections)).items():
        assert leaf.dtype in (np.float32, np.int32), name
    _, wide = last(make_job(task))
    assert_close(state.params, wide.params, atol=0.05)
    kernel = state.params["middle"]["kernel"]
    assert not np.array_equal(kernel, wide.params["middle"]["kernel"])
    assert not np.array_equal(kernel, kernel.astype(jnp.bfloat16).astype(np.float32))
    assert np.isfinite(report.test["loss"]).all()
    jaxpr = str(jax.make_jaxpr(job.task.loss)(*loss_arguments(job)))
    products = re.findall(r"(\w+)\[[^\n]*\] = dot_general", jaxpr)
    assert products
    assert set(products) == {"bf16"}


def test_predictions_are_made_as_losses_are():
    def predict(params, collections, batch):
        return batch["image"].reshape(len(batch["image"]), -1) @ params["stem"]["kernel"]

    assert in_bfloat16(tiny_task()).predict is None
    assert in_auto_axes(tiny_task()).predict is None
    task = dataclasses.replace(tiny_task(), predict=predict)
    params, collections, batch, _ = loss_arguments(make_job(task))
    wide, narrow = (t.predict(params, collections, batch) for t in (task, in_bfloat16(task)))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(np.float32), wide, rtol=0.05, atol=0.05)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        made = jax.jit(in_auto_axes(task).predict)(split, collections, batch)
    np.testing.assert_allclose(made, wide, rtol=1e-5, atol=1e-6)


def loss_arguments(job):
    variables = dict(job.task.init(jax.random.key(0)))
    params = variables.pop("params")
    return params, variables, next(iter(job.task.train_batches(0, 0))), jax.random.key(1)


def test_masks_come_from_the_float32_weights():
    """Two weights that are equal in bfloat16: the larger one stays, whatever its place."""
    job = make_job(in_bfloat16(plain_task()))
    params, *rest = loss_arguments(job)
    kernel = np.array(params["middle"]["kernel"])
    kernel[:4] = np.array([[1.0], [1.0], [1.0 + 2**-12], [1.0]])
    params["middle"]["kernel"] = jnp.asarray(kernel)
    seen = []

    def spy(sparse, *arguments):
        seen.append(sparse["middle"]["kernel"])
        return plain_task().loss(sparse, *arguments)

    task = in_bfloat16(dataclasses.replace(plain_task(), loss=spy))
    task.loss(job.method.sparsifier.apply(params, ()), *rest)
    assert seen[0].dtype == jnp.bfloat16
    expected = np.zeros((4, 16), bool)
    expected[2] = True
    np.testing.assert_array_equal(seen[0][:4] != 0, expected)


def test_remat_keeps_products_only_and_changes_nothing():
    task = tiny_task(epochs=2)
    params, *rest = loss_arguments(make_job(task))
    kept, gradients = [], []
    for loss in (task.loss, with_remat(task).loss):
        _, pullback, _ = jax.vjp(lambda p, loss=loss: loss(p, *rest), params, has_aux=True)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(pullback)))
        gradients.append(pullback(jnp.float32(1)))
    assert kept[1] < 0.8 * kept[0]
    assert_close(*gradients, rtol=1e-6, atol=1e-7)


@slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_together(accumulate):
    report, _ = last(make_job(with_remat(in_bfloat16(tiny_task())), accumulate=accumulate))
    assert report.density == 0.25
    assert report.test["accuracy"] > 0.3
    assert BATCH % accumulate == 0
