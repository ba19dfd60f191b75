"""Times of a training step, method against method."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments.json_files import Numbers
from experiments.training.step import TrainState

# A method's step, the state to start from (the step consumes it), and the batch.
Timed = tuple[Callable[[TrainState, Any], TrainState], TrainState, Any]


def step_times(
    chosen: Mapping[tuple[str, str], Timed], *, rounds: int, reference: str = "dense"
) -> list[Numbers]:
    """Times one step of each program in turn, `rounds` times, after a round to warm up.

    Args:
      chosen: (pattern, method) -> what is timed. Methods with the same step share a measurement.
      rounds: how often.
      reference: the method that the others are compared with.

    Returns:
      Pattern, method, median milliseconds, and the median over the rounds of the ratio to the
      reference in the same round, or NaN without it.
    """
    states = {step: state for step, state, _ in chosen.values()}
    batches = {step: batch for step, _, batch in chosen.values()}
    seconds: dict[Any, list[float]] = {step: [] for step in states}
    for _ in range(rounds + 1):
        # Taking turns spreads a slow moment of the machine over all methods.
        for step in states:
            began = time.perf_counter()
            states[step] = jax.block_until_ready(step(states[step], batches[step]))
            seconds[step].append(time.perf_counter() - began)
    # The first round compiles.
    times = {key: np.array(seconds[step][1:]) for key, (step, _, _) in chosen.items()}
    base = next((taken for (_, method), taken in times.items() if method == reference), np.nan)
    return [
        {
            "pattern": pattern,
            "method": method,
            "milliseconds": 1e3 * float(np.median(taken)),
            "ratio": float(np.median(taken / base)),
        }
        for (pattern, method), taken in times.items()
    ]
