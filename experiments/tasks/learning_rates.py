"""Learning rates: a linear warm-up, then a decay."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax

# (peak, steps of warm-up, steps in all) -> rate over the steps after the warm-up.
Decay = Callable[[float, int, int], optax.Schedule]


def in_parts(
    schedule: str, peak: float, warmup: int, steps: int, restarts: tuple[int, ...]
) -> optax.Schedule:
    """A warm-up and a decay of its own for each part of a run.

    Args:
      schedule: of the decay: "cosine", "linear" or "inverse_sqrt".
      peak: rate after the warm-up.
      warmup: steps, cut to half of a short part.
      steps: in all.
      restarts: steps at which a new part begins.
    """
    decay = {"cosine": cosine, "linear": linear, "inverse_sqrt": inverse_sqrt}[schedule]
    starts, ends = (0, *restarts), (*restarts, steps)
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    parts = [warmed_up(decay, peak, min(warmup, n // 2), n) for n in lengths]
    return optax.join_schedules(parts, list(restarts))


def warmed_up(decay: Decay, peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Rises from 0 to the peak over the warm-up, and then decays."""
    decayed = decay(peak, warmup, steps)
    if warmup == 0:
        return decayed
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decayed], [warmup])


def cosine(peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Half a cosine that ends at 0."""
    # optax refuses a decay over 0 steps.
    return optax.cosine_decay_schedule(peak, max(steps - warmup, 1))


def linear(peak: float, warmup: int, steps: int) -> optax.Schedule:
    """A straight line that ends at 0."""
    return optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))


def inverse_sqrt(peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Counts steps after the warm-up. Without a warm-up it acts as if that took one step.

    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 3, whose peak is
    1 / sqrt(width * warmup).
    """
    del steps
    start = max(warmup, 1)
    # `step` is negative during the warm-up, when optax evaluates this and ignores the result.
    return lambda step: peak * jnp.sqrt(start / (start + jnp.maximum(step, 0)))
