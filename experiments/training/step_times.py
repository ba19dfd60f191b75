"""Times of a training step, method against method."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.json_files import Numbers
from experiments.training.step import Programs, TrainState


class Timed(NamedTuple):
    """What is timed.

    Attributes:
      programs: of a method.
      state: to start from; given up.
      batch: trained on, again and again.
    """

    programs: Programs
    state: TrainState
    batch: Any


def step_times(chosen: Mapping[tuple[str, str], Timed], *, rounds: int) -> list[Numbers]:
    """Times one step of each program in turn, `rounds` times, after a round to warm up.

    Methods that share their programs share one measurement.

    Args:
      chosen: (pattern, method) -> what is timed.
      rounds: how often.

    Returns:
      Pattern, method, median milliseconds, and the median over the rounds of the ratio to dense
      in the same round: NaN where there is no dense.
    """
    distinct = {timed.programs.step: timed for timed in chosen.values()}
    states = {step: timed.state for step, timed in distinct.items()}
    seconds: dict[Any, list[float]] = {step: [] for step in distinct}
    for _ in range(rounds + 1):
        for step, timed in distinct.items():
            began = time.perf_counter()
            states[step] = jax.block_until_ready(step(states[step], timed.batch))
            seconds[step].append(time.perf_counter() - began)
    times = {key: np.array(seconds[timed.programs.step][1:]) for key, timed in chosen.items()}
    dense = next((taken for (_, method), taken in times.items() if method == "dense"), np.nan)
    return [
        {
            "pattern": pattern,
            "method": method,
            "milliseconds": 1e3 * float(np.median(taken)),
            "ratio": float(np.median(taken / dense)),
        }
        for (pattern, method), taken in times.items()
    ]
