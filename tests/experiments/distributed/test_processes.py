"""Several processes on loopback that train one network."""

import json
import re
import resource
import signal
import socket
import time
from functools import partial

import numpy as np
import pytest

import nmjax
from experiments.distributed import processes
from experiments.distributed.processes import is_first, join_processes, tell_all, together
from experiments.json_files import JsonLines
from tests.experiments.training_processes import end, end_all, last_state, start

FLAGS = ["--epochs", "4", "--log-every", "0", "--checkpoint-steps", "13"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two(flags, own=(), **environment):
    """Two processes of four devices each; the second has flags of its own."""
    known = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    return [
        start([*flags, *known, "--process", str(process), *its], devices=4, **environment)
        for process, its in enumerate([(), own])
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


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process on eight devices, whatever their layout."""
    runs = tmp_path_factory.mktemp("runs")
    flags = [*FLAGS, "--mesh", "data=8", "--runs-dir", str(runs), "--name", "one"]
    end(start(flags, devices=8))
    return runs / "one"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "read"),
    [
        # Of batches of 32 and 20 examples.
        (["--mesh", "data=8"], (16 + 16, 16 + 4)),
        # Each process needs every row of a batch, and holds half of each kernel.
        (
            ["--mesh", "model=2,data=4", "--batch-axes", "data", "--shard", "middle/kernel=model"],
            (52, 52),
        ),
        (["--mesh", "data=8", "--layout", "fsdp", "--axis-types", "explicit"], (32, 20)),
        # Each process has every other of eight shards of four.
        (["--mesh", "a=2,b=4", "--batch-axes", "b", "a"], (16 + 12, 16 + 8)),
    ],
    ids=["data", "model", "fsdp", "strided"],
)
def test_two_processes_train_as_one(one, tmp_path, layout, read):
    """And each reads only those of the test examples that its devices need."""
    flags = [*FLAGS, *layout, "--runs-dir", str(tmp_path), "--name", "two"]
    packed = tmp_path / "network.safetensors"
    flags += ["--packed", str(packed)]
    (out, said), (quiet, other_said) = end_all(start_two(flags))
    assert "epoch 4/4" in out
    assert "epoch" not in quiet  # One prints for all.
    for share, error in zip(read, (said, other_said), strict=True):
        # One more example shows the shapes of a batch, from which the plan is made.
        assert f"{4 * share + 1} test examples read" in error
    assert_same_training(tmp_path / "two", one)
    served = np.asarray(nmjax.unpack(nmjax.load_packed(packed))["params"]["middle"]["kernel"])
    trained = last_state(tmp_path / "two")[1]["['train']['params']['middle']['kernel']"]
    assert (served != 0).mean() == 0.5
    np.testing.assert_array_equal(served, np.where(served != 0, trained, 0))
    ours, theirs = (JsonLines(run / "metrics.jsonl").read() for run in (tmp_path / "two", one))
    assert [line["sad_epoch"] for line in ours] == [line["sad_epoch"] for line in theirs]
    assert [line["density"] for line in ours] == [line["density"] for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our["test"]["counted"] == pytest.approx(our["test"]["accuracy"])
        assert our["test"]["accuracy"] == their["test"]["accuracy"]
        np.testing.assert_allclose(our["test"]["loss"], their["test"]["loss"], rtol=1e-4)
    settings = json.loads((tmp_path / "two" / "settings.json").read_text())
    assert settings["machine"]["device"].startswith("8 x cpu")
    # What two processes wrote, one goes on from.
    (tmp_path / "two" / "checkpoints" / "20").rename(tmp_path / "gone")
    out, _ = end(start([*flags, "--resume"], devices=8))
    assert "3 of 4 epochs done" in out
    assert_same_training(tmp_path / "two", one)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_ends_both(tmp_path):
    """At one step, whichever of them was told; what they saved is gone on from."""
    flags = ["--epochs", "1000", "--evaluate-every", "1000", "--log-every", "0", "--mesh", "data=8"]
    flags += ["--checkpoint-every", "1000", "--runs-dir", str(tmp_path), "--name", "told"]
    folder, both = tmp_path / "told", start_two(flags)
    while len(JsonLines(folder / "metrics.jsonl").read()) < 2:
        assert all(process.poll() is None for process in both)
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    (out, _), _ = end_all(both, status=143)
    (steps,) = (int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))
    epochs = steps // 5
    assert f"stopped; --resume continues from epoch {epochs}" in out
    assert epochs >= 2
    assert len(JsonLines(folder / "metrics.jsonl").read()) == epochs
    assert last_state(folder)[1]["['train']['step']"] == steps


@pytest.mark.slow
def test_a_full_disk_of_one_process_ends_both_with_a_line_each(tmp_path):
    """The system refuses large files to the second; the first has written its own."""
    flags = ["--epochs", "1000", "--evaluate-every", "1000", "--log-every", "0", "--mesh", "data=8"]
    flags += ["--layout", "fsdp", "--runs-dir", str(tmp_path), "--name", "full"]
    both = start_two(flags, TINY_WIDTH="128")
    while len(JsonLines(tmp_path / "full" / "metrics.jsonl").read()) < 2:
        assert all(process.poll() is None for process in both)
        time.sleep(0.05)
    resource.prlimit(both[1].pid, resource.RLIMIT_FSIZE, (4000, 4000))
    (_, first), (_, second) = end_all(both, status=1)
    line = "error: a checkpoint could not be written to .*: {}.*whole; make room, then continue"
    assert re.search(line.format("process 1 could not write its part"), first)
    assert re.search(line.format(".*File too large"), second)


@pytest.mark.slow
def test_what_one_process_cannot_read_none_goes_on_from(tmp_path):
    """Damage that the first process does not see, since its devices need none of those shards."""
    flags = [*FLAGS, "--mesh", "data=8", "--layout", "fsdp"]
    flags += ["--runs-dir", str(tmp_path), "--name", "two"]
    # Smaller shards would all lie in one file.
    end_all(start_two(flags, TINY_WIDTH="128"))
    folder = tmp_path / "two"
    steps, whole = last_state(folder)
    written = folder / "checkpoints" / str(steps) / "state" / "ocdbt.process_1" / "d"
    for file in written.iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    both = start_two([*flags, "--resume"], TINY_WIDTH="128")
    (out, said), (_, other_said) = end_all(both)
    assert f"/{steps} is damaged: process 1: " in said
    assert f"it is now damaged-{steps}, and the one before is used" in said
    assert "damaged" not in other_said
    assert "ignored" not in other_said  # Python's word for failures in coroutines of orbax.
    assert "3 of 4 epochs done" in out
    _, again = last_state(folder)
    for name, array in whole.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--epochs", "5"], "process 1 has other settings than process 0: epochs is 5, not 4"),
        (["--runs-dir", "elsewhere"], "is not the folder that process .* put --runs-dir on a disk"),
        (
            ["--data-dir", "elsewhere"],
            "process 1 has other settings .*: corpus is .*elsewhere, not None",
        ),
    ],
)
def test_what_one_process_is_told_otherwise_ends_all(tmp_path, own, message):
    flags = [*FLAGS, "--runs-dir", str(tmp_path)]
    own = [str(tmp_path / flag) if flag == "elsewhere" else flag for flag in own]
    for _, error in end_all(start_two(flags, own=own), status=1):
        assert re.search(f"error: .*{message}", error)


@pytest.mark.slow
def test_what_one_process_may_not_none_does(tmp_path):
    """The first process knows of the run that is there already, and the other learns it."""
    flags = [*FLAGS, "--runs-dir", str(tmp_path)]
    (tmp_path / "digits-small_resnet-sr_ste-2_4").mkdir()
    (tmp_path / "digits-small_resnet-sr_ste-2_4" / "settings.json").write_text("{}")
    (_, first), (_, second) = end_all(start_two(flags), status=1)
    assert "error: /" in first
    assert re.search("error: process 0: .* already holds a run", second)


def test_one_process_joins_nothing():
    join_processes(False, None, None, None)
    assert is_first()
    assert tell_all("täglich") == ["täglich"]
    assert tell_all("") == [""]
    assert tell_all("ä" * 9000) == ["ä" * 9000]


def test_processes_go_on_together_or_not_at_all(monkeypatch):
    def fail():
        raise OSError("disk full")

    assert together(lambda: 3, (ValueError,)) == 3
    with pytest.raises(OSError, match=r"^disk full$"):
        together(fail, (ValueError, OSError))
    with pytest.raises(OSError, match=r"^disk full$"):
        together(fail, (ValueError,))


@pytest.mark.parametrize(
    ("errors", "texts"),
    [
        ([None, OSError("a"), OSError("b")], ["process 1: a", "a", "b"]),
        ([None, None, OSError()], ["process 2: OSError", "process 2: OSError", ""]),
        # The gravest kind decides: else one would end where another goes on.
        ([OSError("a"), ValueError("b"), None], ["process 1: b", "b", "process 1: b"]),
        ([KeyError(3), ValueError("b"), None], ["3", *["process 0: KeyError: 3"] * 2]),
    ],
)
def test_all_processes_fail_alike(monkeypatch, errors, texts):
    """Each process in turn, with what the others say."""

    def act(error):
        if error is not None:
            raise error

    said, raised = [], []
    monkeypatch.setattr(processes, "tell_all", lambda text: said.append(text) or ["1 other"])
    for error in errors:
        with pytest.raises((ValueError, OSError, RuntimeError, KeyError)):
            together(partial(act, error), (ValueError, OSError))
    monkeypatch.setattr(processes, "tell_all", lambda text: said)
    for error in errors:
        with pytest.raises((ValueError, OSError, RuntimeError, KeyError)) as info:
            together(partial(act, error), (ValueError, OSError))
        raised.append(info.value)
    assert [str(error) for error in raised] == texts
    assert len({isinstance(error, (ValueError, OSError)) for error in raised}) == 1
    assert len({isinstance(error, OSError) for error in raised}) == 1


@pytest.mark.parametrize("given", [("host:1", None, None), (None, 2, 0), ("host:1", 2, None)])
def test_what_is_missing_is_said(given):
    with pytest.raises(ValueError, match="need --coordinator, --processes and --process together"):
        join_processes(False, *given)


@pytest.mark.parametrize(("count", "process"), [(2, 2), (2, -1), (0, 0), (-1, 0)])
def test_a_process_beyond_the_number_of_processes_is_refused(count, process):
    with pytest.raises(ValueError, match=f"from 0 to below --processes {count}, got {process}"):
        join_processes(False, "127.0.0.1:1", count, process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "environment"),
    [(["--distributed"], {}), ([], {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"})],
)
def test_a_cluster_that_is_none_is_said(flags, environment):
    _, err = end(start([*flags, "--epochs", "1"], **environment), status=1)
    assert re.search("cannot be joined: .* Give --coordinator, --processes and --process", err)
    assert "unset JAX_COORDINATOR_ADDRESS" in err


def test_a_coordinator_in_the_environment_is_heeded(monkeypatch):
    joined = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *of: joined.append(of))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "")
    join_processes(False, None, None, None)
    assert not joined
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    join_processes(False, None, None, None)
    join_processes(False, None, 2, 1)
    assert joined == [(None, None, None), (None, 2, 1)]


@pytest.mark.slow
def test_processes_join_through_the_environment(tmp_path):
    """No flag says so: the address is JAX's own variable, the numbers are those of Open MPI."""
    flags = ["--epochs", "1", "--log-every", "0", "--mesh", "data=8", "--runs-dir", str(tmp_path)]
    known = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
    }
    both = [
        start(
            [*flags, "--name", "joined"],
            devices=4,
            OMPI_COMM_WORLD_RANK=rank,
            OMPI_COMM_WORLD_LOCAL_RANK=rank,
            **known,
        )
        for rank in ("0", "1")
    ]
    (out, _), (quiet, _) = end_all(both)
    assert "epoch 1/1" in out
    assert "epoch" not in quiet
    settings = json.loads((tmp_path / "joined" / "settings.json").read_text())
    assert settings["machine"]["device"].startswith("8 x cpu")
