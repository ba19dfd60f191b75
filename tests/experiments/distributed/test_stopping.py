"""Signals are noted while something must not be interrupted, and obeyed as before afterwards."""

import signal
import subprocess
import sys

import jax
import pytest

from experiments.distributed import stopping
from experiments.distributed.stopping import ending_at_the_second, noted, preemption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted(number):
    before = signal.getsignal(number)
    with noted(number) as came:
        signal.raise_signal(number)
        assert came == [number]
    assert signal.getsignal(number) is before


def test_signals_belong_to_whom_they_did_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError), noted(signal.SIGINT):
        raise OSError
    assert signal.getsignal(signal.SIGINT) is before


def test_the_first_ctrl_c_is_as_ever():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), ending_at_the_second():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_ends_in_one_line():
    code = """
import signal
from experiments.distributed.stopping import ending_at_the_second, noted
with ending_at_the_second():
    try:
        with noted(signal.SIGINT) as came:
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(came[0])
    finally:
        signal.raise_signal(signal.SIGINT)
        print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    line = "\nstopped at once; --resume continues from the last whole checkpoint\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", line)


def test_sigterm_is_known_after_the_step():
    with preemption() as is_told:
        assert not is_told(1)
        signal.raise_signal(signal.SIGTERM)
        assert is_told(2)


def test_several_processes_stop_where_jax_says(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        stopping.multihost_utils, "reached_preemption_sync_point", lambda steps: steps == 3
    )
    before = signal.getsignal(signal.SIGTERM)
    with preemption() as is_told:
        assert [is_told(steps) for steps in (2, 3)] == [False, True]
        assert signal.getsignal(signal.SIGTERM) is before  # JAX's own listener stays.
