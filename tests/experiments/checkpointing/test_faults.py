"""Runs that are killed, told to stop, or find their folder taken."""

import random
import signal
import time

import numpy as np
import pytest

from experiments.checkpointing.run_folder import take
from experiments.json_files import JsonLines
from tests.experiments.training_processes import end, last_state, start

KILLS = 20
# A checkpoint after every step: most of the time one is being written.
EPOCHS, STEPS = 24, 120
RARELY = ["--method", "one_shot", "--pattern", "1:4", "--epochs", str(EPOCHS)]
RARELY += ["--log-every", "0", "--evaluate-every", "4"]
FLAGS = [*RARELY, "--checkpoint-steps", "1", "--keep-checkpoints", "3"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder for what runs compile, shared by all."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled):
    """A run that nobody disturbed."""
    runs = tmp_path_factory.mktemp("runs")
    end(start([*FLAGS, "--runs-dir", str(runs), "--name", "whole"], compiled=compiled))
    return runs / "whole"


def checkpoints(folder):
    return {int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()}


def is_writing(folder):
    return any("tmp" in path.name for path in (folder / "checkpoints").glob("*"))


def metrics(folder):
    return [{**line, "seconds": 0} for line in JsonLines(folder / "metrics.jsonl").read()]


def assert_same_run(folder, other):
    """Everything that a run leaves, bit for bit."""
    (steps, ours), (their_steps, theirs) = last_state(folder), last_state(other)
    assert steps == their_steps
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    ours, theirs = (
        [{**line, "seconds": 0} for line in JsonLines(f / "metrics.jsonl").read()]
        for f in (folder, other)
    )
    assert ours == theirs


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_never_killed(whole, compiled):
    """Half of the kills strike while a checkpoint is being written."""
    rng, folder = random.Random(0), whole.parent / "killed"
    flags = [*FLAGS, "--runs-dir", str(whole.parent), "--name", "killed", "--resume"]
    writing = 0
    for kill in range(KILLS):
        process = start(flags, compiled=compiled)
        before = max(checkpoints(folder), default=0)
        # Some way into the run, but never so far that nothing is left for the next ones.
        goal = before + rng.randint(1, 4)
        while max(checkpoints(folder), default=0) < goal:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(rng.random() / 10)
        while kill % 2 and not is_writing(folder):
            pass
        known = max(checkpoints(folder))
        process.kill()
        process.communicate()
        writing += is_writing(folder)
        # What was complete stays.
        assert known in checkpoints(folder) or max(checkpoints(folder)) > known
    assert max(checkpoints(folder)) < STEPS
    assert writing >= KILLS // 4
    out, err = end(start(flags, compiled=compiled))
    assert "damaged" not in err
    assert f"epoch {EPOCHS}/{EPOCHS}" in out
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_sigterm_saves_at_once_and_ends_cleanly(whole, compiled):
    flags = [
        *FLAGS[:-6],
        "--runs-dir",
        str(whole.parent),
        "--name",
        "told",
        "--evaluate-every",
        "4",
    ]
    flags += ["--checkpoint-every", "1000"]
    folder, process = whole.parent / "told", start(flags, compiled=compiled)
    while (
        not (folder / "metrics.jsonl").exists()
        or len(JsonLines(folder / "metrics.jsonl").read()) < 2
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = end(process, status=143)
    assert "Traceback" not in err
    (steps,) = checkpoints(folder)
    assert steps >= 10
    epochs, rest = divmod(steps, 5)
    step = f", step {rest}" if rest else ""
    assert f"stopped; --resume continues from epoch {epochs}{step}\n" in out
    end(start([*flags, "--resume"], compiled=compiled))
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused(tmp_path, compiled):
    flags = [*FLAGS, "--runs-dir", str(tmp_path), "--name", "taken", "--resume"]
    lock = take(tmp_path / "taken")
    _, err = end(start(flags, compiled=compiled), status=1)
    assert "taken is in use by process" in err
    assert "wait for that run to end, or give another --name" in err
    lock.close()
    assert sorted(path.name for path in (tmp_path / "taken").iterdir()) == [".lock"]
