"""Methods: rows, schedules, what each trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax
import nmjax.trees.leaves
from experiments.tasks.task import Recipe, learning_rate, total_rate
from experiments.training.loop import train
from experiments.training.methods import (
    METHODS,
    Method,
    check_fits,
    find_row,
    optimizer,
)
from experiments.training.rearranging import free_channels
from experiments.training.step import Job, plan_of
from tests.experiments.tiny import STEPS, tiny_task

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


def test_linear_decay_is_a_straight_line():
    recipe = Recipe(epochs=10, learning_rate=0.2, schedule="linear", warmup_epochs=1.0)
    rate = learning_rate(recipe, 4)
    assert rate(2) == pytest.approx(0.1)
    expected = [0.2 * (40 - t) / 36 for t in (4, 13, 22, 31, 40)]
    np.testing.assert_allclose([rate(t) for t in (4, 13, 22, 31, 40)], expected, atol=1e-6)


def test_the_inverse_square_root_is_the_transformers():
    """width ** -0.5 * min(step ** -0.5, step * warmup ** -1.5), by hand."""
    width, warmup = 64, 8
    peak = (width * warmup) ** -0.5
    recipe = Recipe(epochs=10, learning_rate=peak, schedule="inverse_sqrt", warmup_epochs=2.0)
    rate = learning_rate(recipe, 4)
    for step in (0, 1, 5, 8, 9, 20, 39):
        expected = width**-0.5 * min(max(step, 1e-9) ** -0.5, step * warmup**-1.5)
        assert rate(step) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert total_rate(recipe, 4) == pytest.approx(sum(float(rate(t)) for t in range(40)), rel=1e-5)


ADAM = Recipe(
    epochs=10,
    optimizer="adamw",
    learning_rate=0.01,
    warmup_epochs=0,
    second_momentum=0.98,
    weight_decay=0.1,
)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("name", ["ste", "sr_ste", "sr_ste_decoupled"])
def test_two_steps_of_adamw_by_hand(name, clip):
    """The term goes through clipping and Adam, or is added to what comes out of Adam."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 3)).astype(np.float32)
    plan = nmjax.make_plan({"kernel": jnp.asarray(w)}, "2:4")
    recipe, strength = dataclasses.replace(ADAM, clip=clip), 0.3 if name != "ste" else 0.0
    method = METHODS[name].build(plan, recipe, 4)
    tx = optimizer(method, recipe, 4, strength)
    params = {"kernel": jnp.asarray(w)}
    state = tx.init(params)
    first, second = np.zeros_like(w), np.zeros_like(w)
    rate = learning_rate(recipe, 4)
    for step in (1, 2):
        g = rng.standard_normal(w.shape).astype(np.float32)
        updates, state = tx.update({"kernel": jnp.asarray(g)}, state, params, masks=None)
        params = optax.apply_updates(params, updates)
        pull = strength * np.where(nmjax.nm_mask(jnp.asarray(w), 2, 4), 0, w)
        g = g + (pull if name == "sr_ste" else 0)
        g = g * min(1, clip / np.linalg.norm(g)) if clip else g
        first, second = 0.9 * first + 0.1 * g, 0.98 * second + 0.02 * g**2
        direction = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.98**step)) + 1e-8)
        direction = direction + 0.1 * w + (pull if name == "sr_ste_decoupled" else 0)
        w = w - float(rate(step - 1)) * direction
        np.testing.assert_allclose(params["kernel"], w, rtol=1e-4, atol=1e-6)


def test_each_place_of_the_term_has_its_strength():
    recipe = Recipe(lambda_w=0.2, lambda_decoupled=0.5)
    strengths = {name: row.strength(recipe) for name, row in METHODS.items()}
    assert (strengths["sr_ste"], strengths["sr_ste_decoupled"]) == (0.2, 0.5)
    assert strengths["ste"] == 0


def test_warm_up_never_takes_more_than_half_of_a_short_schedule():
    rate = learning_rate(Recipe(epochs=1, warmup_epochs=5.0), 4)
    assert max(float(rate(t)) for t in range(4)) == pytest.approx(0.1)
    assert rate(3) < 0.1


def test_unknown_methods_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'magic'; choose from dense, one_shot, ste"):
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


def trained(method, pattern, epochs=6):
    """The states after each epoch."""
    task = tiny_task(epochs=epochs)
    plan = plan_of(task, pattern)
    job = Job(task, plan, METHODS[method].build(plan, task.recipe, STEPS))
    return [jax.device_get(report.state.train) for report in train(job)]


def row_counts(mask):
    """Blocks of 4 outputs kept in each row."""
    blocks = np.asarray(mask)[:, ::4]
    np.testing.assert_array_equal(np.repeat(blocks, 4, axis=1), mask)
    return blocks.sum(axis=0)


def test_one_by_n_keeps_the_blocks_of_a_layer_that_are_largest_wherever_they_are():
    states = trained("one_by_n", "1x4@0.75")
    job = Job(tiny_task(), plan_of(tiny_task(), "1x4@0.75"), METHODS["dense"].build(None, None, 0))
    # Chosen from the sorted network.
    variables = {"params": states[2].params, **states[2].collections}
    variables = nmjax.sort_channels(variables, free_channels(job))
    before = nmjax.trees.leaves.named_leaves(variables["params"])
    for name, mask in states[-1].sparse.masks.items():
        sizes = np.abs(before[name]).reshape(16, 4, 4).sum(axis=2)
        kept = np.asarray(mask)[:, ::4]
        assert kept.sum() == 16
        assert sizes[kept].min() > sizes[~kept].max()
    assert any(len(set(row_counts(mask))) > 1 for mask in states[-1].sparse.masks.values())


@pytest.mark.parametrize("method", ["subp", "subp_l1"])
def test_subp_follows_the_recipes_ramp_and_keeps_rows_equal(method):
    epochs, sparsity = 25, 0.75
    states = trained(method, "1x4@0.75", epochs)
    begin, end = 1, 18  # 10/250 and 180/250 of 25 epochs
    for epoch, state in enumerate(states):
        done = np.clip((epoch - begin) / (end - begin), 0, 1) ** 3
        kept = 16 - int(sparsity * 16) + int(np.floor(sparsity * (1 - done) * 16 + 1e-6))
        for mask in state.sparse.masks.values():
            np.testing.assert_array_equal(row_counts(mask), kept)
    for state in states[end:]:
        jax.tree.map(np.testing.assert_array_equal, state.sparse.masks, states[-1].sparse.masks)


def test_the_two_rankings_of_subp_differ():
    masks = [trained(name, "1x4@0.75")[-1].sparse.masks for name in ("subp", "subp_l1")]
    assert nmjax.total_sad(*masks) > 0


def test_methods_of_blocks_refuse_other_patterns():
    check_fits("subp", "1x16@0.5")
    check_fits("ste", "2:4")
    with pytest.raises(ValueError, match="'subp' prunes blocks and cannot take 2:4"):
        check_fits("subp", "2:4")


def test_weight_decay_can_leave_vectors_alone():
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    nothing = jax.tree.map(jnp.zeros_like, params)
    method = METHODS["dense"].build(None, RECIPE, 4)
    for decay_vectors, moved in ((True, ["kernel", "scale"]), (False, ["kernel"])):
        recipe = dataclasses.replace(
            RECIPE, warmup_epochs=0, weight_decay=0.1, decay_vectors=decay_vectors
        )
        tx = optimizer(method, recipe, 4, 0.0)
        updates, _ = tx.update(nothing, tx.init(params), params, masks=None)
        assert [name for name, update in updates.items() if update.any()] == moved
        np.testing.assert_allclose(updates["kernel"], -0.2 * 0.1, rtol=1e-6)


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
        export=lambda params, state: nmjax.prune(params, plan, state["masks"]),
    )
    method = Method(sparsifier, lambda lambda_w: optax.scale(0.5))
    *_, report = train(Job(task, plan, method), seeds=(0, 1))
    np.testing.assert_array_equal(report.state.train.sparse["times"], [3, 3])
    np.testing.assert_allclose(report.density, 0.5)
