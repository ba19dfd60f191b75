"""Sorting the channels of a trained network changes no number that comes out of it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.distributed.seeds import fastest
from experiments.tasks import digits
from experiments.tasks.families.classification import classification_task
from experiments.training.job import assemble_job
from experiments.training.loop import begin, evaluate, train
from experiments.training.rearranging import free_channels, sort_network
from experiments.training.step import RunState, make_programs
from nmjax.trees.leaves import named_leaves
from tests.experiments.tiny import STEPS, tiny_task

SEEDS = (0, 1, 2)
PATTERN = "1x4@0.75"


def make_job(**recipe):
    return assemble_job(tiny_task(**recipe), "one_by_n", PATTERN)


def batches(job, step):
    epoch, index = divmod(step, STEPS)
    rows = [list(job.task.train_batches(seed, epoch))[index] for seed in SEEDS]
    return jax.tree.map(lambda *parts: np.stack(parts), *rows)


@pytest.fixture(
    scope="module", params=[("sgd", jax.vmap), ("sgd", fastest(len(SEEDS))), ("adamw", jax.vmap)]
)
def trained(request):
    """Job, programs and a state of three seeds after some dense steps, with momentum."""
    optimizer, over_seeds = request.param
    job = make_job(epochs=4, optimizer=optimizer)
    programs = make_programs(job, over_seeds=over_seeds)
    run, topology = begin(programs, SEEDS, 0.0)
    for step in range(7):
        run = programs.step(run, batches(job, step))
    return job, programs, RunState(run, topology)


def test_the_network_computes_the_same(trained):
    job, programs, state = trained
    after = programs.rearrange(state)
    before, now = (evaluate(job, programs, s.train) for s in (state, after))
    assert set(now) == {"loss", "accuracy"}
    for name, values in before.items():
        assert values.shape == (len(SEEDS),)
        np.testing.assert_allclose(now[name], values, rtol=1e-5)


def test_it_goes_on_learning_the_same(trained):
    """Momentum that stayed behind would pull on other filters."""
    job, programs, state = trained
    runs = [programs.rearrange(state).train, jax.tree.map(jnp.copy, state.train)]
    for step in (7, 8, 9):
        runs = [programs.step(run, batches(job, step)) for run in runs]
    now, before = (evaluate(job, programs, run) for run in runs)
    # Adam makes full steps of gradients that are rounding errors.
    np.testing.assert_allclose(now["loss"], before["loss"], rtol=1e-3)
    torn = programs.rearrange(state).train._replace(opt_state=state.train.opt_state)
    torn = jax.tree.map(jnp.copy, torn)
    for step in (7, 8, 9):
        torn = programs.step(torn, batches(job, step))
    assert np.abs(evaluate(job, programs, torn)["loss"] - before["loss"]).min() > 3e-3


def test_the_filters_of_every_seed_are_sorted(trained):
    _, programs, state = trained
    before, after = (s.train.params for s in (state, programs.rearrange(state)))
    orders = []
    for layer in ("stem", "middle", "last"):
        norms = np.abs(after[layer]["kernel"]).sum(axis=1)
        assert (np.diff(norms) <= 1e-6).all()
        assert (np.diff(np.abs(before[layer]["kernel"]).sum(axis=1)) > 0).any()
        order = np.argsort(-np.abs(before[layer]["kernel"]).sum(axis=1), kind="stable")
        np.testing.assert_array_equal(
            after[layer]["bias"], np.take_along_axis(np.asarray(before[layer]["bias"]), order, 1)
        )
        orders.append(order)
    assert not all((order == order[0]).all() for order in orders)


def test_earlier_masks_stay_with_their_weights(trained):
    job, programs, state = trained
    masks = programs.masks(state.train.params)
    after = programs.rearrange(state._replace(topology=state.topology._replace(epoch=masks)))
    names = set(job.plan)
    assert (
        set(after.topology.first)
        == set(after.topology.epoch)
        == names
        == {
            "middle/kernel",
            "last/kernel",
        }
    )
    before = named_leaves(state.train.params)
    now = named_leaves(after.train.params)
    for old, new in ((state.topology.first, after.topology.first), (masks, after.topology.epoch)):
        for name in names:
            assert new[name].dtype == bool
            kept, still = (
                np.sort(leaf[mask])
                for leaf, mask in ((before[name], old[name]), (now[name], new[name]))
            )
            np.testing.assert_array_equal(kept, still)


def test_it_happens_once_right_before_the_blocks_are_chosen():
    job, called = make_job(epochs=4), []
    programs = make_programs(job)

    def rearrange(state):
        called.append(int(state.train.step))
        assert all(mask.all() for mask in state.train.sparse.masks.values())
        return programs.rearrange(state)

    watched = programs._replace(rearrange=rearrange)
    *_, report = train(job, programs=watched)
    assert called == [2 * STEPS] == [job.method.rearranges_at]
    assert report.density[0] == pytest.approx(0.25)
    # Seen from the sorted network, pruning flips a share of the masks and not nearly all.
    norms = np.abs(report.state.train.params["middle"]["kernel"]).sum(axis=0)
    assert norms[:4].sum() > norms[-4:].sum()


def test_masks_that_are_chosen_at_once_belong_to_the_weights():
    """With one epoch, the sparsifier chooses before the first step."""
    job = make_job(epochs=1)
    programs = make_programs(job)
    first = begin(programs, (0,), 0.0)
    masks = jax.device_get(first.train.sparse.masks)
    weights = jax.device_get(first.train.params)
    report = next(iter(train(job, programs=programs, start=first)))
    assert report.density[0] == pytest.approx(0.25)
    assert programs.rearrange is None
    for name, mask in masks.items():
        layer = name.split("/")[0]
        kept = np.abs(weights[layer]["kernel"])[mask].mean()
        assert kept > np.abs(weights[layer]["kernel"])[~mask].mean()
        np.testing.assert_array_equal(report.state.train.sparse.masks[name], mask)


@pytest.mark.parametrize("method", ["dense", "one_shot", "subp"])
def test_other_methods_keep_the_order(method):
    job = assemble_job(tiny_task(), method, PATTERN)
    assert make_programs(job).rearrange is None


class Rolled(nn.Module):
    """A network whose last hidden channels have an order that matters."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(16, name="first")(x.reshape(len(x), -1)))
        x = jnp.cumsum(nn.relu(nn.Dense(16, name="second")(x)), axis=-1)
        return nn.Dense(4, name="head")(x)


def test_layers_that_keep_their_order_are_named():
    tiny = tiny_task()
    task = classification_task(
        name="rolled",
        model=Rolled(),
        input_shape=(2, 2, 1),
        train_batches=tiny.train_batches,
        eval_batches=tiny.eval_batches,
        steps_per_epoch=STEPS,
        recipe=tiny.recipe,
        keep_dense=("^head/",),
    )
    job = assemble_job(task, "one_by_n", PATTERN)
    with pytest.warns(UserWarning, match=r"keep the order of their output .*: second/kernel$"):
        programs = make_programs(job)
    state = begin(programs, (0,), 0.0)
    after = programs.rearrange(state)
    before, now = (s.train.params for s in (state, after))
    assert (now["first"]["kernel"] != before["first"]["kernel"]).any()
    np.testing.assert_array_equal(
        np.sort(np.abs(now["second"]["kernel"]), axis=0),
        np.sort(np.abs(before["second"]["kernel"]), axis=0),
    )
    for name, values in evaluate(job, programs, state.train).items():
        np.testing.assert_allclose(evaluate(job, programs, after.train)[name], values, rtol=1e-5)


def test_parts_of_another_shape_stay():
    channels = free_channels(make_job())
    variables = jax.jit(tiny_task().init)(jax.random.key(0))
    count = jnp.arange(3)
    _, (kept, moved), () = sort_network(channels, variables, (count, variables["params"]), ())
    np.testing.assert_array_equal(kept, count)
    assert (moved["stem"]["kernel"] != variables["params"]["stem"]["kernel"]).any()


def test_every_pruned_layer_of_the_digits_is_rearranged(recwarn):
    task = digits.task()
    channels = free_channels(assemble_job(task, "one_by_n", PATTERN))
    assert not recwarn.list
    writers = {name for group in channels for name, _ in group.writers}
    assert {f"params/{name}" for name in assemble_job(task, "ste", PATTERN).plan} <= writers
    # Only the network that is written for tracing shows them.
    with pytest.warns(UserWarning, match="block1/conv1/kernel"):
        free_channels(assemble_job(dataclasses.replace(task, traceable=None), "one_by_n", PATTERN))


def test_the_network_for_tracing_computes_what_the_digits_network_does():
    task = digits.task(widths=(4, 4, 8))
    variables = jax.jit(task.init)(jax.random.key(0))
    batch = next(iter(task.eval_batches()))
    params, rest = variables.pop("params"), variables
    expected = jax.jit(task.evaluate)(params, rest, batch)
    got = jax.jit(task.traceable)(params, rest, batch)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4)
