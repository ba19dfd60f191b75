"""The training loop on meshes of eight simulated devices, against one device."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from experiments.distributed.placement import HERE, make_placement
from experiments.training.economy import in_auto_axes
from experiments.training.loop import begin, evaluate, train
from experiments.training.methods import METHODS
from experiments.training.step import Job, make_programs, plan_of
from nmjax.trees.leaves import named_leaves
from tests.experiments.tiny import tiny_task, with_predictions

LAYOUTS = {
    "data parallel": {"mesh": "data=8"},
    "fsdp": {"mesh": "data=4,model=2", "preset": "fsdp"},
    "tensor": {"mesh": "data=2,model=4", "preset": "tensor"},
    # The middle layer by outputs, the next by inputs, so that nothing is gathered between them.
    "rules": {"mesh": "data=2,model=4", "rules": ("middle/kernel=model", "last/kernel=model,*")},
    "all axes": {"mesh": "a=2,b=4", "preset": "fsdp", "batch_axes": ("a", "b")},
}


def place(job, layout, **options):
    params = jax.eval_shape(job.task.init, jax.random.key(0))["params"]
    return make_placement(params, job.plan, batch_size=8, **LAYOUTS[layout], **options)


def run(job, layout, axis_type=AxisType.Auto, **options):
    """The last report, and the masks of its state."""
    placement = HERE if layout is None else place(job, layout, axis_type=axis_type, **options)
    if axis_type == AxisType.Explicit:
        job = job._replace(task=in_auto_axes(job.task))
    seeds = range(options.get("seeds", 1))
    over_seeds = jax.vmap if len(seeds) > 1 else None
    programs = make_programs(job, over_seeds=over_seeds, layout=placement.layout)
    with placement.active():
        *_, report = train(job, seeds=seeds, programs=programs, placement=placement)
    assert programs.step._cache_size() == 1
    assert programs.evaluate._cache_size() == 1
    return report, placement


def make_job(method, epochs=2):
    task = tiny_task(epochs=epochs)
    plan = plan_of(task, "1x4@0.75" if METHODS[method].blocks_only else "1:4")
    return Job(task, plan, METHODS[method].build(plan, task.recipe, task.steps_per_epoch))


def assert_the_same(report, expected):
    state, other = (jax.device_get(r.state) for r in (report, expected))
    for name, leaf in named_leaves(other).items():
        np.testing.assert_allclose(
            named_leaves(state)[name], leaf, rtol=2e-4, atol=2e-5, err_msg=name
        )
        if leaf.dtype == bool:
            np.testing.assert_array_equal(named_leaves(state)[name], leaf)
    for name, values in expected.test.items():
        np.testing.assert_allclose(report.test[name], values, rtol=1e-3)
    np.testing.assert_array_equal(report.sad_epoch, expected.sad_epoch)
    np.testing.assert_array_equal(report.density, expected.density)


@pytest.fixture(scope="module")
def alone():
    """Method -> its report on one device."""
    reports = {}

    def report_of(method):
        if method not in reports:
            reports[method] = run(make_job(method), None)[0]
        return reports[method]

    return report_of


# All are run by `make test-slow`, these two by default too.
QUICK = [("fsdp", AxisType.Auto), ("rules", AxisType.Explicit)]


@pytest.mark.parametrize(
    ("layout", "axis_type"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in itertools.product(LAYOUTS, (AxisType.Auto, AxisType.Explicit))
    ],
)
def test_a_mesh_trains_as_one_device_does(alone, layout, axis_type):
    report, placement = run(make_job("sr_ste"), layout, axis_type)
    assert_the_same(report, alone("sr_ste"))
    train_state, topology = report.state
    for name, leaf in named_leaves(train_state.params).items():
        expected = placement.layout.sharding(name, leaf.shape)
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), name
        (momentum,) = (
            value
            for path, value in named_leaves(train_state.opt_state).items()
            if path.endswith(f"trace/{name}")
        )
        assert momentum.sharding == leaf.sharding
        if name in topology.first:
            assert topology.first[name].sharding == leaf.sharding
    if layout != "data parallel":
        assert not train_state.params["middle"]["kernel"].sharding.is_fully_replicated


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layout", "axis_type"),
    [
        ("one_shot", "fsdp", AxisType.Auto),
        ("subp", "data parallel", AxisType.Auto),
        ("one_by_n", "fsdp", AxisType.Auto),
        ("one_by_n", "tensor", AxisType.Explicit),
    ],
)
def test_methods_that_remember_masks(alone, method, layout, axis_type):
    report, _ = run(make_job(method), layout, axis_type)
    assert_the_same(report, alone(method))
    masks = report.state.train.sparse.masks
    for name, kernel in named_leaves(report.state.train.params).items():
        assert name not in masks or masks[name].sharding == kernel.sharding


@pytest.mark.slow
def test_seeds_on_a_mesh():
    job = make_job("sr_ste")
    report, _ = run(job, "fsdp", seeds=2)
    for seed in (0, 1):
        *_, expected = train(job, seeds=(seed,))
        for name, leaf in named_leaves(jax.device_get(expected.state.train.params)).items():
            got = named_leaves(jax.device_get(report.state.train.params))[name][seed]
            np.testing.assert_allclose(got, leaf, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_test_set_that_does_not_split_is_evaluated_as_on_one_device(axis_type):
    """Batches of 27, of which the last has 20 examples, on four devices."""
    job = make_job("sr_ste")

    def eval_batches():
        for batch in tiny_task().eval_batches():
            yield {name: values[:27] for name, values in batch.items()}

    task = dataclasses.replace(with_predictions(job.task), eval_batches=eval_batches)
    found = []
    for placement in (HERE, place(job, "fsdp", axis_type=axis_type)):
        is_explicit = placement.layout is not None and axis_type == AxisType.Explicit
        placed = job._replace(task=in_auto_axes(task) if is_explicit else task)
        programs = make_programs(placed, layout=placement.layout)
        with placement.active():
            state = begin(programs, (0,), 0.0)
            found.append(evaluate(placed, programs, state.train, placement))
    expected, split = found
    assert expected.keys() == {"loss", "accuracy", "counted"}
    assert split["counted"] == expected["counted"]
    assert split["accuracy"] == expected["accuracy"]
    np.testing.assert_allclose(split["loss"], expected["loss"], rtol=1e-5)


def test_the_first_state_is_the_same_on_any_mesh():
    job = make_job("sr_ste")
    programs = make_programs(job)
    split = make_programs(job, layout=place(job, "fsdp").layout)
    kernels = [p.init(np.int32(3))["params"]["middle"]["kernel"] for p in (programs, split)]
    np.testing.assert_array_equal(*kernels)
    assert kernels[1].addressable_shards[0].data.shape == (16, 4)
