"""Several processes that train one network, each on the devices it has."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

# What JAX reads where it is not told the coordinator.
_COORDINATOR = "JAX_COORDINATOR_ADDRESS"

# Bytes of what a process tells the others.
_LONGEST = 4096


def join_processes(
    distributed: bool, coordinator: str | None, processes: int | None, process: int | None
) -> None:
    """Connects this process with the others of its run; must come before JAX computes anything.

    Args:
      distributed: whether to ask the cluster (Slurm, Open MPI, Kubernetes, TPU) for what is not
        given. Implied where the environment has JAX_COORDINATOR_ADDRESS, which stands in for
        `coordinator`.
      coordinator: "host:port" of process 0.
      processes: how many there are.
      process: which one this is, from 0.

    Raises:
      ValueError: some of the last three are given and others not, without a cluster to ask; or the
        cluster does not say what is missing.
    """
    given = (coordinator, processes, process)
    distributed = distributed or bool(os.environ.get(_COORDINATOR))
    if not distributed and given == (None, None, None):
        return
    if not distributed and None in given:
        raise ValueError(
            "several processes need --coordinator, --processes and --process together, or "
            f"--distributed to ask the cluster; got {coordinator}, {processes} and {process}"
        )
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except ValueError as error:
        raise ValueError(
            f"the processes cannot be joined: {error} Give --coordinator, --processes and "
            f"--process; for one process alone, give no --distributed and unset {_COORDINATOR}"
        ) from error


def is_first() -> bool:
    """Whether this process writes and prints for all."""
    return jax.process_index() == 0


def leave(status: int) -> NoReturn:
    """Ends this process at once, though others of its run have not come to their end.

    Python's own exit would wait for them for minutes, and they may be waiting for this one. JAX
    ends them when it notices.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def tell_all(text: str) -> list[str]:
    """What every process says, in their order. Each must call this, and waits for the others.

    Args:
      text: of this process; what is beyond 4,096 bytes is cut off.
    """
    said = np.zeros(_LONGEST, np.uint8)
    encoded = np.frombuffer(text.encode()[:_LONGEST], np.uint8)
    said[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(said)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def together(act: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
    """What `act` returns, if it returns in every process: either all go on, or none does.

    Each process must call this, and waits for the others. A process that fails alone would leave
    them waiting where it never comes.

    Args:
      act: must not wait for other processes.
      errors: that it may raise, each made of one text, the gravest first.

    Raises:
      An error of the same kind in every process, the gravest that `act` raised in any: what it
        raised here, or else with the text of the first process that raised it. What is not among
        `errors` is graver than these, and a RuntimeError in the other processes.
    """
    kinds: tuple[type[Exception], ...] = (RuntimeError, *errors)
    failure: Exception | None = None
    grade, own = 0, ""
    try:
        result = act()
    except Exception as error:
        failure = error
        grade = next((at for at, kind in enumerate(errors, 1) if isinstance(error, kind)), 0)
        name = type(error).__name__
        own = f"{grade} {(str(error) or name) if grade else f'{name}: {error}'}"
    said = [(text.partition(" "), process) for process, text in enumerate(tell_all(own)) if text]
    if not said:
        return result
    # One that went on, or treated it otherwise, would wait where the others never come.
    gravest, process, text = min(
        (int(number), process, text) for (number, _, text), process in said
    )
    if failure is not None and grade == gravest:
        raise failure
    raise kinds[gravest](f"process {process}: {text}") from failure
