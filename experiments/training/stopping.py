"""SIGTERM, which a scheduler sends to a run that is to make room: noticed between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):  # noqa: N818  # not an error
    """The run was asked to stop, and its state is saved."""


class Preemption:
    """Listens for SIGTERM while it is entered.

    With several processes JAX listens for it, and lets all of them stop at the same step, whichever
    of them was told.
    """

    def __init__(self) -> None:
        """Does not listen yet."""
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> Preemption:
        """Begins to listen."""
        if not jax.distributed.is_initialized():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the signal to whom it belonged before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self, steps: int) -> bool:
        """Whether to stop after this step; to be asked once after each."""
        if jax.distributed.is_initialized():
            self._asked |= multihost_utils.reached_preemption_sync_point(steps)
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True
