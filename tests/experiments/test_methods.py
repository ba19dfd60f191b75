"""Methods: rows, schedules, what each trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax
from experiments.methods import METHODS, Method, find_row, learning_rate
from experiments.step import Job, plan_of
from experiments.tasks.task import Recipe
from experiments.train import train
from tests.experiments.tiny import STEPS, compile_little, tiny_task  # noqa: F401

pytestmark = pytest.mark.usefixtures("compile_little")

RECIPE = Recipe(epochs=10, learning_rate=0.2, warmup_epochs=1.0)


def test_learning_rate_warms_up_then_falls_to_zero():
    rate = learning_rate(RECIPE, 4)
    np.testing.assert_allclose([rate(t) for t in range(5)], [0, 0.05, 0.1, 0.15, 0.2], rtol=1e-6)
    assert rate(22) == pytest.approx(0.1)
    assert rate(40) == pytest.approx(0, abs=1e-6)


def test_learning_rate_starts_again_at_each_restart():
    rate = learning_rate(RECIPE, 4, restarts=(20,))
    assert rate(19) < 0.01
    np.testing.assert_allclose(
        [rate(20 + t) for t in range(5)], [0, 0.05, 0.1, 0.15, 0.2], rtol=1e-6
    )
    assert rate(40) == pytest.approx(0, abs=1e-6)


def test_warm_up_never_takes_more_than_half_of_a_short_schedule():
    rate = learning_rate(Recipe(epochs=1, warmup_epochs=5.0), 4)
    assert max(float(rate(t)) for t in range(4)) == pytest.approx(0.1)
    assert rate(3) < 0.1


def test_unknown_methods_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'magic'; there are dense, one_shot, ste"):
        find_row("magic")


def test_one_shot_keeps_its_mask_and_what_it_exports_satisfies_the_pattern():
    task = tiny_task(epochs=6)
    plan = plan_of(task, "1:4")
    job = Job(task, plan, METHODS["one_shot"].build(plan, task.recipe, STEPS))
    masks, exported, densities = [], None, []
    for report in train(job):
        densities.append(float(report.density[0]))
        state = report.state.train
        masks.append(jax.device_get(state.sparse.masks))
        exported = job.method.sparsifier.apply(state.params, state.sparse)
    assert densities == [1.0, 1.0, 1.0, 0.25, 0.25, 0.25]
    for name in plan:
        assert masks[2][name].all()
        np.testing.assert_array_equal(masks[3][name], masks[5][name])
        kernel = np.asarray(exported[name.split("/")[0]]["kernel"])
        groups = (kernel != 0).reshape(4, 4, -1).sum(axis=1)
        assert (groups == 1).all()


def test_only_the_strength_tells_the_signs_of_sr_ste_apart():
    rows = METHODS["sr_ste"], METHODS["sr_ste_negative"]
    assert rows[0].build is rows[1].build
    assert rows[0].lambda_fraction > 0 > rows[1].lambda_fraction


def test_a_method_from_outside_plugs_in():
    """A sparsifier with a state of its own, refreshed between epochs, and a transform."""
    task = tiny_task(epochs=3)
    plan = plan_of(task, "2:4")
    sparsifier = nmjax.Sparsifier(
        init=lambda params, key: {
            "masks": nmjax.compute_masks(params, plan),
            "times": jnp.int32(0),
        },
        refresh=lambda state, params, step: {
            "masks": nmjax.compute_masks(params, plan),
            "times": state["times"] + 1,
        },
        apply=lambda params, state: nmjax.sparsify(params, plan, state["masks"]),
    )
    method = Method(sparsifier, lambda lambda_w: optax.scale(0.5))
    *_, report = train(Job(task, plan, method), seeds=(0, 1))
    np.testing.assert_array_equal(report.state.train.sparse["times"], [3, 3])
    np.testing.assert_allclose(report.density, 0.5)
