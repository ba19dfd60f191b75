"""What orbax prints besides raising it is held back, and nothing else is."""

import logging
import sys
from types import SimpleNamespace

import pytest

from experiments.checkpointing.orbax_noise import hold_back

ORBAX = "/site-packages/orbax/checkpoint/_src/futures/future.py"


@pytest.fixture
def told(monkeypatch):
    """Errors that nobody can catch and that the hook from before is told of."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    hold_back()
    hook = sys.unraisablehook
    hold_back()
    assert sys.unraisablehook is hook
    return found


@pytest.mark.parametrize(
    ("path", "function", "error", "is_told"),
    [
        (ORBAX, "run", OSError("disk full"), False),
        (ORBAX, "run", None, True),
        (ORBAX, "cancel", OSError("disk full"), True),
        ("/home/me/future.py", "run", OSError("disk full"), True),
        (ORBAX.replace("future.py", "storage_backend.py"), "run", OSError("disk full"), True),
    ],
)
def test_logged_tracebacks_of_what_is_raised_are_held_back(told, path, function, error, is_told):
    exc_info = None if error is None else (type(error), error, None)
    logger = logging.getLogger("absl")
    record = logger.makeRecord("absl", logging.ERROR, path, 1, "failed", (), exc_info, function)
    assert bool(logger.filter(record)) == is_told


@pytest.mark.parametrize(
    ("error", "thing", "is_told"),
    [
        (RuntimeError("Event loop is closed"), None, False),
        (RuntimeError("Event loop is closed"), "a coroutine", True),
        (RuntimeError("cannot write"), None, True),
    ],
)
def test_the_closed_event_loop_is_held_back(told, error, thing, is_told):
    unraisable = SimpleNamespace(object=thing, exc_value=error)
    sys.unraisablehook(unraisable)
    assert told == [unraisable] * is_told
