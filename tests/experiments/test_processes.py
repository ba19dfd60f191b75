"""Several processes on loopback that train one network."""

import json
import re
import signal
import socket
import time

import numpy as np
import pytest

from experiments.metrics_log import MetricsLog
from experiments.processes import is_first, join_processes
from tests.experiments.training_processes import end, last_state, start

FLAGS = ["--epochs", "4", "--log-every", "0", "--checkpoint-steps", "13"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two(flags, **options):
    """Two processes of four devices each."""
    together = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    return [
        start([*flags, *together, "--process", str(process)], devices=4, **options)
        for process in range(2)
    ]


def assert_same_training(folder, other):
    """The same weights to rounding, the same masks."""
    (steps, ours), (their_steps, theirs) = last_state(folder), last_state(other)
    assert steps == their_steps
    assert ours.keys() == theirs.keys()
    masks = 0
    for name, array in theirs.items():
        if "topology" in name:
            masks += array.dtype == np.uint8
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
        np.testing.assert_allclose(ours[name], array, rtol=1e-3, atol=2e-5, err_msg=name)
    assert masks > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["--mesh", "data=8"],
        # Each process needs every row of a batch, and holds half of each kernel.
        ["--mesh", "model=2,data=4", "--batch-axes", "data", "--shard", "middle/kernel=model"],
        ["--mesh", "data=8", "--layout", "fsdp", "--axis-types", "explicit"],
    ],
    ids=["data", "model", "fsdp"],
)
def test_two_processes_train_as_one(tmp_path, layout):
    flags = [*FLAGS, *layout, "--runs-dir", str(tmp_path), "--name"]
    end(start([*flags, "one"], devices=8))
    first, second = start_two([*flags, "two"])
    assert "epoch 4/4" in end(first)[0]
    assert "epoch" not in end(second)[0]  # One prints for all.
    assert_same_training(tmp_path / "two", tmp_path / "one")
    ours, theirs = (MetricsLog(tmp_path / name).read() for name in ("two", "one"))
    assert [line["sad_epoch"] for line in ours] == [line["sad_epoch"] for line in theirs]
    assert [line["density"] for line in ours] == [line["density"] for line in theirs]
    settings = json.loads((tmp_path / "two" / "settings.json").read_text())
    assert settings["machine"]["device"].startswith("8 x cpu")
    # What two processes wrote, one goes on from.
    (tmp_path / "two" / "checkpoints" / "20").rename(tmp_path / "gone")
    out, _ = end(start([*flags, "two", "--resume"], devices=8))
    assert "3 of 4 epochs done" in out
    assert_same_training(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_ends_both(tmp_path):
    """At one step, whichever of them was told; what they saved is gone on from."""
    flags = ["--epochs", "1000", "--evaluate-every", "1000", "--log-every", "0", "--mesh", "data=8"]
    flags += ["--checkpoint-every", "1000", "--runs-dir", str(tmp_path), "--name", "told"]
    folder, both = tmp_path / "told", start_two(flags)
    while len(MetricsLog(folder).read()) < 2:
        assert all(process.poll() is None for process in both)
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    out, _ = end(both[0], status=143)
    end(both[1], status=143)
    (steps,) = (int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))
    epochs = steps // 5
    assert f"stopped; --resume goes on from epoch {epochs}" in out
    assert epochs >= 2
    assert len(MetricsLog(folder).read()) == epochs
    assert last_state(folder)[1]["['train']['step']"] == steps


def test_one_process_joins_nothing():
    join_processes(False, None, None, None)
    assert is_first()


@pytest.mark.parametrize("given", [("host:1", None, None), (None, 2, 0), ("host:1", 2, None)])
def test_what_is_missing_is_said(given):
    with pytest.raises(ValueError, match="need --coordinator, --processes and --process together"):
        join_processes(False, *given)


@pytest.mark.slow
def test_a_cluster_that_is_none_is_said():
    _, err = end(start(["--distributed", "--epochs", "1"]), status=1)
    assert re.search("cannot be joined: .* Give --coordinator, --processes and --process", err)
