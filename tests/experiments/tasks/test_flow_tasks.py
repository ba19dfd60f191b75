"""The flow tasks: batches, recipe, a few steps of training, the real layouts end to end."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.models.flow.raft import tiny_raft
from experiments.tasks import flow as module
from experiments.tasks import flying_chairs, sintel
from experiments.tasks.families.optical_flow import flow_sums, no_motion_error, shown_pairs
from experiments.tasks.flow import drawn_pairs, train_example
from experiments.tasks.flying_chairs import as_arrays
from experiments.tasks.options import Options
from experiments.tasks.sintel import eval_example
from experiments.training.flags import Flags, make_job, make_task
from experiments.training.loop import train
from tests.experiments.data.test_flow_folders import write_chairs, write_sintel

# Compiles in seconds.
TINIER = {"widths": (8,), "strides": (4, 1), "iterations": 1, "hidden": 8}


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TRAIN_PAIRS", 24)
        patch.setattr(module, "TEST_PAIRS", 8)
        patch.setattr(module, "_EVAL_BATCH", 4)
        patch.setattr(module, "tiny_raft", lambda: replace(tiny_raft(), **TINIER))
        yield


def test_batches_depend_on_seed_and_epoch_only():
    task = module.task()

    def first(seed, epoch):
        return next(iter(task.train_batches(seed, epoch)))["first"]

    np.testing.assert_array_equal(first(1, 2), first(1, 2))
    for other in ((1, 3), (2, 2)):
        assert not np.array_equal(first(1, 2), first(*other))


def test_batches_are_what_the_loss_asks_for():
    task = module.task()
    for batch, count in ((next(task.train_batches(0, 0)), 8), (next(task.eval_batches()), 4)):
        shapes = {name: values.shape for name, values in batch.items() if name != "valid"}
        assert shapes == {
            "first": (count, 64, 64, 3),
            "second": (count, 64, 64, 3),
            "flow": (count, 64, 64, 2),
            "known": (count, 64, 64),
        }
        assert all(batch[name].dtype == np.float32 for name in shapes)
        assert -1 <= batch["first"].min() < -0.5 < 0.5 < batch["first"].max() <= 1
        assert batch["known"].all()


def test_an_epoch_sees_every_pair_once():
    task = module.task()
    assert task.steps_per_epoch == 3
    epochs = [list(task.train_batches(0, epoch)) for epoch in (0, 1)]
    # Mirroring changes no component's size.
    sums = [
        np.sort(np.concatenate([np.abs(batch["flow"]).sum(axis=(1, 2, 3)) for batch in batches]))
        for batches in epochs
    ]
    drawn = [np.abs(flow).sum() for _, _, flow in drawn_pairs("train", 24)]
    assert len(set(drawn)) == 24
    for found in sums:
        np.testing.assert_allclose(found, np.sort(drawn), rtol=1e-5)


def test_a_pair_comes_in_four_ways_that_keep_the_flow_true():
    pair = drawn_pairs("train", 24)[0]
    seen = {}
    for seed in range(30):
        batch = train_example(pair, np.random.default_rng(seed))
        seen[batch["flow"].tobytes()] = batch
    assert len(seen) == 4
    plain = as_arrays(pair)
    for batch in seen.values():
        across, down = np.sign(
            batch["flow"].mean(axis=(0, 1)) * plain["flow"].mean(axis=(0, 1))
        ).astype(int)
        for name in ("first", "second"):
            np.testing.assert_array_equal(batch[name], plain[name][::down, ::across])
        expected = plain["flow"][::down, ::across] * np.array([across, down])
        np.testing.assert_array_equal(batch["flow"], expected)


def test_training_and_test_pairs_move_differently():
    train, test = drawn_pairs("train", 24), drawn_pairs("test", 8)
    assert not {flow.tobytes() for _, _, flow in train} & {flow.tobytes() for _, _, flow in test}
    assert all(image.dtype == np.uint8 for image in train[0][:2])


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(ValueError, match="from 1 to 24"):
        make_task(Flags(task="flow", batch_size=25))


def test_no_motion_is_as_wrong_as_the_flow_is_long():
    task = module.task()
    lengths = [np.linalg.norm(batch["flow"], axis=-1) for batch in task.eval_batches()]
    assert dict(task.baselines)["without motion"] == pytest.approx(np.mean(lengths), rel=1e-5)


def test_known_pixels_alone_make_the_baseline():
    batch = {
        "flow": np.array([[[[3, 4], [100, 0]]]], np.float32),
        "known": np.array([[[1, 0]]], np.float32),
        "valid": np.ones(1),
    }
    assert no_motion_error([batch]) == pytest.approx(5)


def test_metrics_that_are_shown_are_measured():
    task = module.task()
    zero = np.zeros((1, 2, 2, 2))
    measured = jax.eval_shape(flow_sums, zero, zero, np.ones((1, 2, 2)), np.ones(1))
    assert {metric.name for metric in task.metrics} <= set(measured)
    assert all(metric.sign == -1 for metric in task.metrics)


def test_loss_and_metrics_are_scalars():
    task = module.task()
    batch = next(task.eval_batches())

    def run(key):
        variables = task.init(key)
        params = variables.pop("params")
        loss, collections = task.loss(params, variables, batch, key)
        return loss, task.evaluate(params, collections, batch)

    loss, sums = jax.eval_shape(run, jax.random.key(0))
    assert loss.shape == ()
    assert {value.shape for value in sums.values()} == {()}
    assert {metric.name for metric in task.metrics} < set(sums)


@pytest.mark.slow
def test_a_few_sparse_steps_change_the_error_and_can_be_shown():
    job = make_job(Flags(task="flow", pattern="2:4", method="sr_ste", epochs=1, batch_size=8))
    (report,) = train(job, watch_every=3)
    assert report.density[0] == pytest.approx(0.5)
    assert np.isfinite(report.train_loss).all()
    assert {"EPE", "over 1 px", "over 3 px", "over 5 px", "outliers", "loss"} == set(report.test)
    state = jax.device_get(report.state.train)
    rows = job.task.show(state.params, state.collections)
    assert len(rows) == 4
    assert list(rows[0])[-1] == "network"
    assert all(text.startswith("data:image/jpeg;base64,") for text in rows[0].values())


def test_pictures_leave_unknown_flow_out():
    batch = {name: values[:1] for name, values in next(module.task().eval_batches()).items()}
    batch["flow"][0, 0, 0] = np.nan
    flow = np.zeros_like(batch["flow"])
    batch["known"][0, 0, 0] = 0
    (row,) = shown_pairs(batch, flow)
    assert list(row) == ["first image", "second image", "true flow", "network"]


def test_recipe_follows_the_flags_and_the_model_is_fixed():
    task = make_task(Flags(task="flow", epochs=3, batch_size=2, learning_rate=0.5))
    recipe = task.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (3, 2, 0.5)
    assert (recipe.optimizer, recipe.schedule, recipe.clip) == ("adamw", "linear", 1.0)
    assert next(iter(task.train_batches(0, 0)))["first"].shape[0] == 2
    with pytest.raises(ValueError, match="no model named 'raft'; choose from raft_tiny"):
        make_task(Flags(task="flow", model="raft"))


def test_chairs_come_in_batches_of_one_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(flying_chairs, "CROP", (4, 8))
    write_chairs(tmp_path, "111121")
    task = flying_chairs.task(Options(batch_size=2, data_dir=tmp_path))
    assert task.steps_per_epoch == 2
    batches = list(task.train_batches(0, 0))
    assert [batch["first"].shape for batch in batches] == [(2, 4, 8, 3)] * 2
    assert batches[0]["flow"].shape == (2, 4, 8, 2)
    (second,) = task.train_rows(seed=0, epoch=0, first_step=1, rows=np.array([1]))
    np.testing.assert_array_equal(second["first"], batches[1]["first"][1:])
    (batch,) = task.eval_batches()
    (part,) = task.eval_rows(rows_of=lambda size: np.arange(size // 2))
    np.testing.assert_array_equal(part["first"], batch["first"][:4])
    assert batch["first"].shape == (8, 6, 8, 3)
    assert batch["valid"].tolist() == [1] + [0] * 7
    assert np.abs(batch["first"]).max() <= 1


def test_the_published_recipe_makes_200_000_steps():
    from experiments.tasks.flying_chairs import RECIPE

    assert RECIPE.epochs * (22_232 // RECIPE.batch_size) == pytest.approx(200_000, rel=1e-3)
    assert RECIPE.warmup_epochs / RECIPE.epochs == pytest.approx(0.05)


def test_sintel_is_padded_and_its_padding_unknown(tmp_path):
    write_chairs(tmp_path / "FlyingChairs_release", "11112")
    written = write_sintel(tmp_path / "Sintel", {"alley_1": 3})
    task = sintel.task(Options(data_dir=tmp_path))
    (batch,) = task.eval_batches()
    assert batch["first"].shape == (4, 8, 8, 3)
    assert batch["valid"].tolist() == [1, 1, 0, 0]
    assert batch["known"][0].sum() == 6 * 8
    image = written["clean", "alley_1", 1] / 127.5 - 1
    np.testing.assert_allclose(batch["first"][0, :6], image, atol=1e-6)
    np.testing.assert_allclose(batch["first"][0, 6:], image[-1:].repeat(2, axis=0), atol=1e-6)


def test_unknown_flow_on_disk_stays_unknown():
    flow = np.zeros((8, 8, 2), np.float32)
    flow[2, 3] = 1.5e9
    images = np.zeros((2, 8, 8, 3), np.uint8)
    known = eval_example((*images, flow))["known"]
    assert known.sum() == 63
    assert known[2, 3] == 0


@pytest.mark.parametrize("task", ["flying_chairs", "sintel"])
def test_missing_data_are_a_clear_error(task, tmp_path, capsys):
    from experiments.train import main

    assert main(["--task", task, "--data-dir", str(tmp_path), "--runs-dir", str(tmp_path)]) == 1
    assert "Unpack" in capsys.readouterr().err
