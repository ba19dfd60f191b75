"""`python -m experiments.train`: how a process ends."""

import signal
import time
from types import SimpleNamespace

import jax
import pytest

from experiments import train
from experiments.json_files import JsonLines
from tests.experiments.training_processes import end, start


class LeftError(Exception):
    """In place of the end of the process."""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("is_open", [False, True])
def test_an_error_nobody_expects_leaves_no_other_process_waiting(
    monkeypatch, capsys, is_open, processes
):
    def fail(*given):
        raise LookupError("nobody expects it")

    def leave(status):
        raise LeftError(status)

    monkeypatch.setattr(jax, "process_count", lambda: processes)
    run = SimpleNamespace(finish=fail)
    monkeypatch.setattr(train, "Run", (lambda flags: run) if is_open else fail)
    monkeypatch.setattr(train, "leave", leave)
    # Alone it ends as any Python does.
    with pytest.raises(LookupError if processes == 1 else LeftError):
        train.main([])
    told = "LookupError: nobody expects it" in capsys.readouterr().err
    assert told == (processes == 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_while_a_run_is_opened_is_one_line(monkeypatch, capsys, processes):
    def press(flags):
        signal.raise_signal(signal.SIGINT)

    left = []
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(train, "Run", press)
    monkeypatch.setattr(train, "leave", left.append)
    assert train.main([]) == 130
    assert capsys.readouterr().err == "stopped before training began\n"
    assert left == [130] * (processes - 1)


@pytest.mark.slow
def test_ctrl_c_pressed_again_and_again_leaves_no_traceback(tmp_path):
    process = start(["--epochs", "1000", "--runs-dir", str(tmp_path), "--name", "run"])
    while len(JsonLines(tmp_path / "run" / "metrics.jsonl").read()) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    _, error = end(process, status=130)
    assert "Traceback" not in error
    assert "KeyboardInterrupt" not in error


@pytest.mark.parametrize(("is_open", "leaves"), [(False, False), (True, True)])
def test_a_refusal_is_one_line(monkeypatch, capsys, is_open, leaves):
    """All processes are refused together; one that has begun may fail alone."""

    def refuse(*given):
        raise OSError("disk full")

    left = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    run = SimpleNamespace(finish=refuse)
    monkeypatch.setattr(train, "Run", (lambda flags: run) if is_open else refuse)
    monkeypatch.setattr(train, "leave", left.append)
    assert train.main([]) == 1
    assert capsys.readouterr().err == "error: disk full\n"
    assert left == [1] * leaves
