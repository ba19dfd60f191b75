"""Times of functions, taken in turns so that a slow spell of the machine hits them all."""

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
    """Seconds of each function on the same arguments, round by round.

    Args:
      functions: name -> function, compiled already or compiled by its first call.
      *arguments: given to every function; not donated.
      rounds: in each of them every function runs once.
      warmup: rounds that are not counted.
      at_least: seconds; a function that takes less is called several times in a row, which is what
        a serving loop does, and the time of one call is the mean of those.
      pause: seconds of rest before each function, so that no thread of the one before, spinning in
        wait for more work, takes a core from it.

    Returns:
      name -> wall times in seconds until the result is ready, one for each round.
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
            del result
            if round_ >= warmup:
                seconds[name].append(once)
            else:
                calls[name] = max(1, math.ceil(at_least / once))
    return seconds


def output_on_cores(command: Sequence[str], cores: int) -> str:
    """Runs a command on so many cores, which is how many threads XLA and PyTorch then make.

    They make their threads once, so that each number of threads needs a process of its own.

    Args:
      command: a program and its arguments; what it writes to stderr is shown.
      cores: at least one.

    Returns:
      What the command printed.

    Raises:
      ValueError: this process may not use as many cores.
      RuntimeError: the command failed, or the system cannot bind processes to cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise RuntimeError(f"{sys.platform} does not bind processes to cores; measure on Linux")
    mine = sorted(os.sched_getaffinity(0))
    if not 1 <= cores <= len(mine):
        raise ValueError(f"asked for {cores} threads; this process may use {len(mine)} cores")
    os.sched_setaffinity(0, mine[:cores])  # The child inherits it.
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    finally:
        os.sched_setaffinity(0, mine)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit status {done.returncode}")
    return done.stdout
