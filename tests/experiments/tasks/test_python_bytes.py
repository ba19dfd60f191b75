"""Language modeling: batches, metric, baselines, and a few steps of training."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.library_sources import Sources
from experiments.models.text import transformer
from experiments.tasks import python_bytes
from experiments.tasks.options import Options
from experiments.tasks.python_bytes import METRIC, Portion, baselines
from experiments.training.loop import train
from experiments.training.methods import METHODS
from experiments.training.step import Job, plan_of

RNG = np.random.default_rng(0)
TEXT = np.frombuffer(b"def name(self):\n    return self.name\n" * 40, np.uint8)
SOURCES = Sources(TEXT, TEXT[200:900], 3, 1, ("gone.py",))
PORTION = Portion(window=16, steps_per_epoch=8, test_windows=40)
OPTIONS = Options(epochs=2, batch_size=4)


@pytest.fixture(scope="module")
def task():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(transformer.DECODERS, "decoder_tiny", transformer.Size(16, 32, 2, 1))
        return python_bytes.task(OPTIONS, sources=SOURCES, portion=PORTION)


def test_batches_are_windows_of_the_training_files(task):
    batches = list(task.train_batches(0, 0))
    assert len(batches) == task.steps_per_epoch == 8
    text = TEXT.tobytes()
    for batch in batches:
        assert batch["tokens"].shape == (4, 17)
        assert all(row.astype(np.uint8).tobytes() in text for row in batch["tokens"])
    again, other = list(task.train_batches(0, 0)), list(task.train_batches(0, 1))
    np.testing.assert_array_equal(batches[3]["tokens"], again[3]["tokens"])
    assert (batches[0]["tokens"] != other[0]["tokens"]).any()


def test_test_windows_are_spread_from_the_first_byte_to_the_last(task):
    batches = list(task.eval_batches())
    assert [int(batch["valid"].sum()) for batch in batches] == [32, 8]
    rows = np.concatenate([batch["tokens"][batch["valid"] == 1] for batch in batches])
    assert rows.shape == (40, 17)
    np.testing.assert_array_equal(rows[0], SOURCES.test[:17])
    np.testing.assert_array_equal(rows[-1], SOURCES.test[-17:])


def test_a_process_reads_its_rows_alone(task, monkeypatch):
    read = []

    def windows(stream, starts, window):
        read.append(len(starts))
        return real(stream, starts, window)

    real = python_bytes._windows
    whole, tests = list(task.train_batches(3, 1)), list(task.eval_batches())
    monkeypatch.setattr(python_bytes, "_windows", windows)
    rows = np.array([1, 3])
    parts = list(task.read(3, 1, 5, rows))
    assert read == [2, 2, 2]
    for part, batch in zip(parts, whole[5:], strict=True):
        np.testing.assert_array_equal(part["tokens"], batch["tokens"][rows])
    read.clear()
    own = np.array([5, 9, 31, 32])
    parts = list(task.read_test(lambda size: own))
    assert read == [3, 1]
    for part, batch in zip(parts, tests, strict=True):
        for name, values in batch.items():
            np.testing.assert_array_equal(part[name][:3], values[own[:3]])
            assert not part[name][3:].any()


def test_bits_per_byte_against_numpy(task):
    params = jax.jit(task.init)(jax.random.key(0))["params"]
    network = transformer.Decoder(transformer.Size(16, 32, 2, 1), 256)
    *_, batch = task.eval_batches()
    sums = task.evaluate(params, {}, batch)
    logits = np.asarray(network.apply({"params": params}, batch["tokens"][:, :-1]), np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(logs, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    bits = -chosen[batch["valid"] == 1].mean() / np.log(2)
    assert sums["count"] == 8
    assert sums[METRIC.name] / 8 == pytest.approx(bits, rel=1e-5)
    # Padding may hold anything.
    spoilt = {**batch, "tokens": np.where(batch["valid"][:, None] == 1, batch["tokens"], 7)}
    assert task.evaluate(params, {}, spoilt)["loss"] == sums["loss"]


def test_baselines_by_brute_force():
    train_bytes, test_bytes = RNG.integers(0, 5, 400), RNG.integers(0, 5, 90)
    sources = Sources(train_bytes.astype(np.uint8), test_bytes.astype(np.uint8), 1, 1, ())
    found = dict(baselines(sources))
    single = [-np.log2((sum(a == b for a in train_bytes) + 1) / (400 + 256)) for b in test_bytes]
    assert found["frequencies of bytes"] == pytest.approx(np.mean(single))
    following = list(itertools.pairwise(train_bytes))
    pairs = []
    for a, b in itertools.pairwise(test_bytes):
        both = sum((a, b) == pair for pair in following)
        pairs.append(-np.log2((both + 1) / (sum(a == first for first, _ in following) + 256)))
    assert found["frequencies of pairs"] == pytest.approx(np.mean(pairs))
    assert found["all bytes alike"] == 8


@pytest.mark.parametrize("method", ["sr_ste", "sr_ste_decoupled"])
def test_a_few_steps_learn_something(task, method):
    plan = plan_of(task, "2:4")
    job = Job(task, plan, METHODS[method].build(plan, task.recipe, task.steps_per_epoch))
    reports = list(train(job, lambda_w=METHODS[method].strength(task.recipe)))
    assert reports[-1].test[METRIC.name][0] < 7
    assert reports[-1].density == pytest.approx(0.5)


def test_what_is_shown_is_the_text_and_its_continuation(task):
    params = jax.jit(task.init)(jax.random.key(0))["params"]
    shown = task.show(params, {})
    text = SOURCES.test.tobytes().decode()
    for row in shown:
        assert list(row) == ["before", "original", "network"]
        assert row["before"] + row["original"] in text
        assert len(row["before"]) == 8
        assert len(row["original"]) == 40
    assert shown == task.show(params, {})


def test_notes_say_what_was_read(task):
    assert task.notes == (
        "3 training files with 1,480 bytes, 1 test files with 700; 1 files could not be read: "
        "gone.py.",
    )


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="no model named 'huge'; choose from decoder_tiny"):
        python_bytes.task(Options(model="huge"), sources=SOURCES)
    with pytest.raises(ValueError, match="the test files have 10 bytes in total, but a window"):
        python_bytes.task(sources=SOURCES._replace(test=TEXT[:10]))


def test_the_embedded_model_and_its_loss_fit_together():
    task = python_bytes.task(sources=SOURCES)

    def loss(key):
        tokens = jnp.zeros((2, 9), jnp.int32)
        return task.loss(task.init(key)["params"], {}, {"tokens": tokens}, key)

    value, collections = jax.eval_shape(loss, jax.random.key(0))
    assert value.shape == ()
    assert collections == {}
