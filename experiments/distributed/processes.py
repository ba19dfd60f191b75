"""Several processes that train one network, each on the devices it has."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.distributed.barriers import wait_for_others
from experiments.distributed.stopping import INTERRUPTED

T = TypeVar("T")

# What JAX reads where it is not told the coordinator.
_COORDINATOR = "JAX_COORDINATOR_ADDRESS"


def join_processes(
    distributed: bool, coordinator: str | None, processes: int | None, process: int | None
) -> None:
    """Connects this process with the others of its run. Call it before JAX computes anything.

    The arguments are the flags of these names. JAX_COORDINATOR_ADDRESS in the environment implies
    `distributed` and replaces `coordinator`.

    Raises:
      ValueError: the last three are incomplete, and no cluster knows the rest; or there is no such
        process.
    """
    given = {coordinator, processes, process}
    distributed = distributed or bool(os.environ.get(_COORDINATOR))
    if not distributed and given == {None}:
        return
    if not distributed and None in given:
        raise ValueError(
            "several processes need --coordinator, --processes and --process together, or "
            f"--distributed to ask the cluster; got {coordinator}, {processes} and {process}"
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(
            f"--process must be from 0 to below --processes {processes}, got {process}"
        )
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except ValueError as error:
        raise ValueError(
            f"the processes cannot be joined: {error} Give --coordinator, --processes and "
            f"--process; for a single process, drop --distributed and unset {_COORDINATOR}"
        ) from error


def is_first() -> bool:
    """Whether this process writes and prints for all."""
    return jax.process_index() == 0


def leave(status: int) -> NoReturn:
    """Ends this process within seconds, and JAX then ends the others.

    Python's own exit would wait minutes for them, and they may be waiting for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    wait_for_others()
    os._exit(status)


def leave_if_interrupted(status: int) -> None:
    """Ends this process if Ctrl-C ended its work. Call it when all files are written.

    XLA may still be compiling in other threads, and Python's own exit then ends in a segmentation
    fault.
    """
    if status != INTERRUPTED:
        return
    # Python's own exit would end the processes that read data.
    for child in multiprocessing.active_children():
        child.terminate()
    leave(status)


def tell_all(text: str) -> list[str]:
    """Returns the text of every process, in order. Each must call this, and waits for all."""
    own = np.frombuffer(text.encode(), np.uint8)
    longest = np.max(multihost_utils.process_allgather(np.array([own.size])))
    # Arrays that are gathered must have one shape.
    rows = multihost_utils.process_allgather(np.pad(own, (0, longest + 1 - own.size)))
    return [row.tobytes().rstrip(b"\0").decode() for row in np.atleast_2d(rows)]


def together(
    act: Callable[[], T], errors: tuple[type[Exception], ...] = (ValueError, OSError)
) -> T:
    """Returns what `act` returns if it succeeds in every process; otherwise every process raises.

    Each process must call this, and waits for the others. If one failed by itself, the others
    would wait for it forever at their next meeting.

    Args:
      act: must not wait for other processes.
      errors: kinds that it may raise, each built from one text, the most severe first. Any other
        kind is more severe still, and becomes a RuntimeError in the other processes.

    Raises:
      The most severe kind that `act` raised anywhere: this process's own error if it is of that
      kind, or one with the text of the first process that raised it.
    """
    failure: Exception | None = None
    grade, own = 0, ""  # What the others are told; "0 ..." is the most severe.
    try:
        result = act()
    except Exception as error:
        failure = error
        grade = next((at for at, kind in enumerate(errors, 1) if isinstance(error, kind)), 0)
        name = type(error).__name__
        own = f"{grade} " + ((str(error) or name) if grade else f"{name}: {error}")
    said = []
    for process, text in enumerate(tell_all(own)):
        number, _, cause = text.partition(" ")
        said += [(int(number), process, cause)] if text else []
    if not said:
        return result
    # The kind must be the same everywhere: callers treat kinds differently, and one that goes on
    # would wait where the others never come.
    worst, process, cause = min(said)
    if failure is not None and grade == worst:
        raise failure
    kinds: tuple[type[Exception], ...] = (RuntimeError, *errors)
    raise kinds[worst](f"process {process}: {cause}") from failure
