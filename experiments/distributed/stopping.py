"""Signals that are noted and obeyed later, between two steps or after a save."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

INTERRUPTED = 130  # What shells report for a program that Ctrl-C has ended.


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
def ending_at_the_second(
    number: int = signal.SIGINT, *, status: int = INTERRUPTED
) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt once; pressed again, it ends the process at once.

    A run saves its state after the first, which may take long.
    """

    def first(*_: object) -> None:
        signal.signal(number, second)
        raise KeyboardInterrupt

    def second(*_: object) -> None:
        # `print` fails here if the signal came within another one.
        os.write(2, b"\nstopped at once; --resume continues from the last whole checkpoint\n")
        os._exit(status)

    before = signal.signal(number, first)
    try:
        yield
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
