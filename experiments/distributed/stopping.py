"""Signals that are noted and obeyed later, between two steps or after a save."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@contextmanager
def noted(number: int) -> Iterator[list[int]]:
    """Yields a list that grows with every signal, which is noted instead of obeyed."""
    came: list[int] = []
    # Python allows this in the main thread only.
    before = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(number, before)


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Listens for SIGTERM, which a scheduler sends to a run that has to make room.

    Yields a function to call after each step with the steps done; it returns whether to stop.
    """
    if jax.distributed.is_initialized():
        # JAX listens, and stops all processes at the same step, whichever of them got the signal.
        yield multihost_utils.reached_preemption_sync_point
        return
    with noted(signal.SIGTERM) as came:
        yield lambda steps: bool(came)
