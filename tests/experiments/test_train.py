"""`python -m experiments.train`: how a process ends."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest

from experiments import compare, train
from experiments.json_files import JsonLines
from tests.experiments.training_processes import ROOT, end, start


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


@pytest.mark.parametrize("status", [0, 1, 130, 143])
def test_only_an_interrupted_process_skips_the_exit_of_python(status):
    """XLA may still be compiling in a thread, and Python's own exit would then crash."""
    code = (
        "import atexit, sys; from experiments.distributed.processes import leave_if_interrupted;"
        "atexit.register(print, 'exit of Python'); print('last line', end=' ');"
        f"leave_if_interrupted({status}); sys.exit({status})"
    )
    run = [sys.executable, "-c", code]
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == status, ended.stderr
    assert ended.stdout.split() == ("last line" + " exit of Python" * (status != 130)).split()


@pytest.mark.slow
def test_ctrl_c_while_the_first_step_is_compiled(tmp_path):
    flags = ["--epochs", "12", "--method", "subp", "--pattern", "1x4@0.5", "--batch-size", "256"]
    # Compiled from nothing, which takes seconds, and says when it begins.
    modes = {"JAX_LOG_COMPILES": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *flags, "--runs-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **modes},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "Compiling jit(_step)" not in process.stderr.readline():
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, _ = end(process, status=130)
    assert "stopped; --resume continues from epoch 0" in out


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


def test_a_pattern_that_does_not_fit_is_explained_in_flags(tmp_path, capsys):
    assert train.main(["--pattern", "3:7", "--runs-dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "block1/conv1/kernel (3, 3, 16, 16): 16 inputs are not a multiple of 7" in err
    assert "Choose another --pattern, or list them in --keep-dense" in err
    assert "exclude=" not in err
    assert "on_indivisible" not in err


def test_patterns_of_a_comparison_that_do_not_fit_are_explained(tmp_path, capsys):
    flags = ["--patterns", "3:7", "--methods", "ste", "--runs-dir", str(tmp_path)]
    assert compare.main(flags) == 1
    err = capsys.readouterr().err
    assert "16 inputs are not a multiple of 7" in err
    assert "Choose other patterns." in err
    assert "exclude=" not in err
