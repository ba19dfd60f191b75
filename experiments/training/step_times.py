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
    """A method's programs, the state to start from (it is consumed), and the batch of a step."""

    programs: Programs
    state: TrainState
    batch: Any


def step_times(chosen: Mapping[tuple[str, str], Timed], *, rounds: int) -> list[Numbers]:
    """Times one step of each program in turn, `rounds` times, after a round to warm up.

    Args:
      chosen: (pattern, method) -> what is timed. Methods with the same programs share one
        measurement.
      rounds: how often.

    Returns:
      Pattern, method, median milliseconds, and the median over the rounds of the ratio to dense in
      the same round, or NaN without dense.
    """
    states = {timed.programs.step: timed.state for timed in chosen.values()}
    batches = {timed.programs.step: timed.batch for timed in chosen.values()}
    seconds: dict[Any, list[float]] = {step: [] for step in states}
    for _ in range(rounds + 1):
        # Taking turns spreads a slow moment of the machine over all methods.
        for step in states:
            began = time.perf_counter()
            states[step] = jax.block_until_ready(step(states[step], batches[step]))
            seconds[step].append(time.perf_counter() - began)
    # The first round compiles.
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
