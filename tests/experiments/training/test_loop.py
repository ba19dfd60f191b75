"""The training loop: seeds, repetition, compilation, continuing, stopping."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

import nmjax
from experiments.distributed.seeds import across_cores, one_by_one
from experiments.tasks.task import learning_rate
from experiments.training.loop import begin, train
from experiments.training.methods import METHODS, Method, Strengths
from experiments.training.step import Job, make_programs, plan_of
from nmjax.trees.leaves import named_leaves
from tests.experiments.tiny import STEPS, tiny_task, with_predictions


def make_job(method, **task):
    task = tiny_task(**task)
    plan = plan_of(task, "1x4@0.75" if METHODS[method].blocks_only else "1:4")
    return Job(task, plan, METHODS[method].build(plan, task.recipe, task.steps_per_epoch))


def last(reports):
    *_, report = reports
    return report


def params_of(report, seed=None):
    params = jax.device_get(report.state.train.params)
    return params if seed is None else jax.tree.map(lambda leaf: leaf[seed], params)


# Their training steps have tests of their own; here they only meet the loop.
GRADUAL = ("decaying_mask", "decaying_mask_scaled", "dense_then", "max_q", "s_ste", "lbc")


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[pytest.mark.slow] * (method in GRADUAL))
        for method in METHODS
        if method not in ("step", "cast")
    ],
)
def test_seeds_trained_together_equal_seeds_trained_alone(method):
    job = make_job(method)
    together, programs = last(train(job, seeds=(3, 5))), make_programs(job)
    for index, seed in enumerate((3, 5)):
        alone = last(train(job, seeds=(seed,), programs=programs))
        chex_close(params_of(together, index), params_of(alone), rtol=2e-4, atol=2e-5)
        for name in alone.test:
            np.testing.assert_allclose(together.test[name][index], alone.test[name][0], rtol=1e-4)
        assert together.density[index] == alone.density[0]


@pytest.mark.parametrize("method", ["step", "cast"])
def test_methods_that_replace_adam_train_with_it_alone(method):
    job = make_job(method, optimizer="adamw", learning_rate=0.01)
    report = last(train(job))
    assert report.density == pytest.approx(0.25, abs=1e-3)
    assert np.isfinite(report.train_loss).all()
    with pytest.raises(ValueError, match="replaces Adam"):
        make_job(method)


@pytest.mark.parametrize("over_seeds", [one_by_one, across_cores(4)], ids=["one", "cores"])
def test_every_way_to_train_seeds_together_gives_the_same(over_seeds):
    job, seeds = make_job("sr_ste", epochs=2), (0, 1, 2, 3)
    expected = last(train(job, seeds=seeds))
    got = last(train(job, seeds=seeds, programs=make_programs(job, over_seeds=over_seeds)))
    chex_close(params_of(got), params_of(expected), rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(got.sad_epoch, expected.sad_epoch)


def test_the_same_run_twice_is_the_same():
    job = make_job("ste")
    first, second = (last(train(job, seeds=(0, 1))) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, params_of(first), params_of(second))
    np.testing.assert_array_equal(first.train_loss, second.train_loss)


def test_seeds_differ():
    report = last(train(make_job("ste"), seeds=(0, 1)))
    assert report.train_loss[0] != report.train_loss[1]


def test_the_step_compiles_once_for_all_epochs_and_strengths():
    job = make_job("sr_ste", epochs=3)
    programs = make_programs(job)
    for lambda_w in (0.0, 0.1, -0.1):
        last(train(job, lambda_w=lambda_w, programs=programs))
    assert programs.step._cache_size() == 1
    assert programs.evaluate._cache_size() == 1


def test_continuing_from_a_state_equals_never_stopping():
    job = make_job("one_shot")
    whole = last(train(job))
    reports = train(job)
    half = [next(reports), next(reports)][1]
    reports.close()
    rest = list(train(job, start=half.state))
    assert [report.epoch for report in rest] == [3, 4]
    jax.tree.map(np.testing.assert_array_equal, params_of(rest[-1]), params_of(whole))
    for name, value in whole.sad_first.items():
        np.testing.assert_array_equal(rest[-1].sad_first[name], value)


@pytest.mark.parametrize("method", ["sr_ste", pytest.param("subp", marks=pytest.mark.slow)])
def test_continuing_from_the_middle_of_an_epoch_equals_never_stopping(method):
    job, stop = make_job(method), 2 * STEPS + 3

    class StopError(Exception):
        pass

    def keep(steps, state):
        nonlocal kept
        assert steps == state.steps_done()
        if steps == stop:
            kept = jax.device_get(state)
            raise StopError

    kept = None
    with pytest.raises(StopError):
        last(train(job, on_step=keep, watch_every=2))
    *_, rest = train(job, start=kept, watch_every=2)
    *_, whole = train(job, watch_every=2)
    rest, whole = ({**vars(report), "seconds": 0} for report in (rest, whole))
    jax.tree.map(np.testing.assert_array_equal, rest, whole)


def test_a_loss_that_is_not_finite_stops_with_seed_and_step():
    job = make_job("ste", scale=float("inf"))
    with pytest.raises(FloatingPointError, match=r"seed 7 .* from step 0 on \(epoch 1"):
        last(train(job, seeds=(7,)))


def test_programs_for_another_number_of_seeds_are_refused():
    job = make_job("ste")
    with pytest.raises(ValueError, match="2 seeds"):
        last(train(job, seeds=(0, 1), programs=make_programs(job)))


def test_one_step_is_the_papers_update():
    """SGD with coupled decay and momentum, the sparse-refined term first, against optax's parts."""
    job = make_job("sr_ste", epochs=1)
    task, lambda_w = job.task, 0.3
    variables = dict(jax.jit(task.init)(jax.random.fold_in(jax.random.key(0), 0)))
    params = variables.pop("params")
    velocity = jax.tree.map(np.zeros_like, params)
    rates = [0.05 * t / 2 for t in range(2)] + [
        float(optax.cosine_decay_schedule(0.05, STEPS - 2)(t)) for t in range(STEPS - 2)
    ]

    def loss(params, variables, batch):
        sparse = nmjax.sparsify(params, job.plan)
        return task.loss(sparse, variables, batch, jax.random.key(0))

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for rate, batch in zip(rates, task.train_batches(0, 0), strict=True):
        masks = nmjax.compute_masks(params, job.plan)
        (_, variables), grads = value_and_grad(params, variables, batch)
        names = iter(named_leaves(params))

        def gradient(g, w, names=names, masks=masks):
            name = next(names)
            pull = lambda_w * ~masks[name] * w if name in masks else 0.0
            return g + pull + 5e-5 * w

        grads = jax.tree.map(gradient, grads, params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        params = jax.tree.map(lambda w, v, rate=rate: w - rate * v, params, velocity)
    got = last(train(job, lambda_w=lambda_w))
    chex_close(params_of(got), params, rtol=1e-4, atol=1e-6)


def test_what_a_report_measures():
    job = make_job("ste", epochs=2)
    programs = make_programs(job)
    first, states = None, []
    for report in train(job, programs=programs, watch_every=1):
        states.append(nmjax.compute_masks(params_of(report), job.plan))
        reports = (*(() if first is None else (first,)), report)
        first = first or report
    start = task_masks(job)
    for name, masks in states[-1].items():
        assert reports[-1].sad_first[name] == np.sum(start[name] != masks)
    assert reports[-1].sad_epoch == nmjax.total_sad(states[0], states[1])
    assert reports[-1].density == 0.25
    assert 0 <= reports[0].flip_rate[0] <= 0.5
    assert set(reports[-1].test) == {"loss", "accuracy"}


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_predictions_are_scored_seed_by_seed(seeds):
    """A task that predicts logits and counts right answers itself, as its accuracy does."""
    job = make_job("ste", epochs=1)
    report = last(train(job._replace(task=with_predictions(job.task)), seeds=seeds))
    np.testing.assert_allclose(report.test["counted"], report.test["accuracy"], rtol=1e-6)


@pytest.mark.parametrize(("method", "expected"), [("sr_ste", 0.01), ("sr_ste_decoupled", 0.5)])
def test_the_strength_is_the_recipes_for_the_place_of_the_term(method, expected):
    report = last(train(make_job(method, epochs=1)))
    assert report.state.train.lambda_w == pytest.approx(expected)


def test_only_some_epochs_are_evaluated_and_always_the_last():
    evaluated = [r.epoch for r in train(make_job("dense", epochs=5), evaluate_every=2) if r.test]
    assert evaluated == [2, 4, 5]


@pytest.mark.parametrize(
    ("method", "seeds"), [("one_by_n", (0, 1)), ("subp", (0, 1)), ("subp", (0,))]
)
def test_what_a_report_measures_of_blocks(method, seeds):
    job = make_job(method, epochs=5)
    masks = [{name: np.ones((16, 16), bool) for name in job.plan}]
    for report in train(job, seeds=seeds):
        now = jax.device_get(report.state.train.sparse.masks)
        masks.append({name: mask.reshape(-1, 16, 16)[0] for name, mask in now.items()})
        before, after = ({n: m[:, ::4].T for n, m in pair.items()} for pair in masks[-2:])
        assert report.blocks["sad"][0] == nmjax.total_sad(*masks[-2:])
        assert report.blocks["regrown"][0] == sum((after[n] & ~before[n]).sum() for n in after)
        for name, kept in report.blocks["kept_rows"].items():
            assert kept.shape == (len(seeds), 4)
            np.testing.assert_array_equal(kept[0], after[name].sum(axis=1))
    assert report.density == pytest.approx(0.25)


@pytest.mark.parametrize(("said", "found"), [(STEPS - 1, "more"), (STEPS + 2, STEPS)])
def test_a_task_that_miscounts_its_batches_is_refused(said, found):
    """Its mean loss and its schedules would be wrong."""
    task = dataclasses.replace(tiny_task(epochs=2), steps_per_epoch=said)
    job = make_job("ste", epochs=2)._replace(task=task)
    message = f"says steps_per_epoch={said}, but epoch 1 has {found} batches"
    with pytest.raises(ValueError, match=message):
        last(train(job))


def test_methods_without_block_masks_report_no_blocks():
    assert last(train(make_job("one_shot", epochs=2))).blocks == {}
    assert last(train(make_job("sr_ste", epochs=1))).blocks == {}


@pytest.mark.parametrize(
    ("every", "expected"), [(None, [0, 5, 10]), (4, [0, 4, 8, 12]), (1, [*range(15)])]
)
def test_a_method_says_how_often_it_is_refreshed(every, expected):
    """Its state lists the steps at which it was, whichever epoch they fall into."""
    task = tiny_task(epochs=3)
    sparsifier = nmjax.Sparsifier(
        init=lambda params, key: {"steps": np.full(15, -1, np.int32), "count": np.int32(0)},
        refresh=lambda state, params, step: {
            "steps": state["steps"].at[state["count"]].set(step),
            "count": state["count"] + 1,
        },
        apply=lambda params, state: params,
        export=lambda params, state: params,
    )
    method = Method(sparsifier, lambda lambda_w: optax.identity(), refresh_every=every)
    report = last(train(Job(task, plan_of(task, "2:4"), method)))
    steps = report.state.train.sparse["steps"]
    assert [step for step in steps.tolist() if step >= 0] == expected


@pytest.mark.parametrize(
    ("method", "accumulate"),
    [
        ("decaying_mask", 1),
        ("max_q", 2),
        *(pytest.param(method, 1, marks=pytest.mark.slow) for method in GRADUAL[1:]),
    ],
)
def test_a_refresh_within_the_step_equals_one_before_it(method, accumulate):
    """Bit for bit, for the whole state, over two epochs."""
    job = make_job(method, epochs=2)._replace(accumulate=accumulate)
    within = last(train(job)).state.train
    apart = job._replace(method=job.method._replace(refresh_every=None))
    programs = make_programs(apart)
    state = begin(programs, (0,), job.task.recipe.strength(decoupled=False)).train
    for epoch in range(2):
        for batch in job.task.train_batches(0, epoch):
            state = programs.step(programs.refresh(state), batch)
    # The loop sets the sum to 0 after each epoch.
    state = state._replace(loss_sum=within.loss_sum)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(within), jax.device_get(state))


def test_the_pull_acts_on_the_blocks_that_are_out():
    """Two steps from one state that differ in lambda_w differ by lr * lambda_w * ~mask * w."""
    job, lambda_w = make_job("subp", epochs=6), 0.5
    programs = make_programs(job)
    reports = train(job, programs=programs)
    state = jax.device_get([next(reports) for _ in range(5)][-1].state.train)
    batch = next(iter(job.task.train_batches(0, 5)))
    rate = learning_rate(job.task.recipe, STEPS)(state.step)
    without, pulled = (
        named_leaves(programs.step(state._replace(lambda_w=np.float32(strength)), batch).params)
        for strength in (0.0, lambda_w)
    )
    for name, w in named_leaves(state.params).items():
        out = ~state.sparse.masks[name] if name in job.plan else np.zeros_like(w)
        expected = -rate * lambda_w * out * w
        np.testing.assert_allclose(pulled[name] - without[name], expected, atol=1e-6)
        assert name not in job.plan or np.abs(expected).max() > 1e-4


def task_masks(job):
    params = job.task.init(jax.random.fold_in(jax.random.key(0), 0))["params"]
    return nmjax.compute_masks(params, job.plan)


def chex_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_runs_of_one_program_may_differ_in_learning_rate_and_decay(optimizer):
    recipe = {"optimizer": optimizer, "weight_decay": 0.01, "epochs": 2}
    factors = Strengths(np.array([0.0, 0.02]), np.array([1.0, 2.0]), np.array([10.0, 1.0]))
    together = last(train(make_job("sr_ste", **recipe), seeds=(3, 3), lambda_w=factors))
    changed = ({"weight_decay": 0.1, "lambda_w": 0.0}, {"learning_rate": 0.1, "lambda_w": 0.02})
    for place, numbers in enumerate(changed):
        alone = last(train(make_job("sr_ste", **{**recipe, **numbers}), seeds=(3,)))
        expected = named_leaves(params_of(alone))
        for name, found in named_leaves(params_of(together, place)).items():
            # A normalization removes some biases; Adam makes steps of the rounding that is left.
            if optimizer == "sgd" or not name.endswith("bias"):
                np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-5)
