"""Times functions in alternation, so that a slow moment of the machine affects all of them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def interleaved_times(
    functions: Mapping[str, Callable[..., Any]],
    *arguments: Any,
    rounds: int = 15,
    warmup: int = 2,
    at_least: float = 0.0,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Measures the seconds that each function takes on the same arguments, round by round.

    Args:
      functions: name -> function, already compiled or compiled by its first call.
      *arguments: passed to every function; not donated.
      rounds: number of rounds; every function runs once in each.
      warmup: number of rounds before those, which do not count.
      at_least: seconds. A faster function is called several times in a row, as in a serving loop,
        and the time of one call is the mean.
      pause: seconds to wait before each function. The previous function's threads may still be
        spinning while they wait for work, which would slow down the next.

    Returns:
      Name -> wall times in seconds until the result is ready, one for each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    calls = dict.fromkeys(functions, 1)
    for round_ in range(warmup + rounds):
        for name, function in functions.items():
            time.sleep(pause)
            start = time.perf_counter()
            for _ in range(calls[name]):
                result = jax.block_until_ready(function(*arguments))
            once = (time.perf_counter() - start) / calls[name]
            del result  # Frees its memory before the next function runs.
            if round_ >= warmup:
                seconds[name].append(once)
            else:
                # The last warm-up round decides, since earlier ones include compilation.
                calls[name] = max(1, math.ceil(at_least / once))
    return seconds


def output_on_cores(command: Sequence[str], cores: int) -> str:
    """Runs a command on a limited number of cores, so that XLA and PyTorch create as many threads.

    They create their threads only once, so each thread count needs a process of its own.

    Args:
      command: a program and its arguments. Its stderr is shown.
      cores: number of cores, at least one.

    Returns:
      The output of the command.

    Raises:
      ValueError: this process may not use that many cores.
      RuntimeError: the command failed, or the system cannot bind processes to cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise RuntimeError(f"{sys.platform} cannot bind processes to cores; measure on Linux")
    mine = sorted(os.sched_getaffinity(0))
    if not 1 <= cores <= len(mine):
        raise ValueError(f"asked for {cores} threads, but this process may use {len(mine)} cores")
    os.sched_setaffinity(0, mine[:cores])  # The child inherits it.
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    finally:
        os.sched_setaffinity(0, mine)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit status {done.returncode}")
    return done.stdout
