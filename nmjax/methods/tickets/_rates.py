"""The learning rate of cycles that end in tickets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from nmjax.masks.arguments import check_number
from nmjax.methods.sparsifier import check_count, check_steps

if TYPE_CHECKING:
    import chex


def ticket_rate(
    rate: float | Callable[[chex.Numeric], chex.Numeric],
    begin: int,
    every: int,
    *,
    low: float,
    high: float,
    shape: Literal["triangle", "halves"] = "triangle",
) -> Callable[[chex.Numeric], jax.Array]:
    """A learning rate that goes up and down in every cycle, for optax.

    Args:
      rate: until step `begin`: a number, or a schedule of optax.
      begin: step of the first cycle.
      every: steps of a cycle.
      low: the lower rate of a cycle; published: 1e-3, and 1e-4 on ImageNet.
      high: the higher rate; published: 5e-3, 5e-4 on ImageNet, and 1e-2 for FreeTickets.
      shape: `"triangle"` rises from low to high and falls back, as in Sup-tickets; `"halves"` is
        high in the first half and low in the second, as in FreeTickets.

    Returns:
      step -> rate.

    Raises:
      TypeError: a number of steps is not an integer; another number is none.
      ValueError: a number of steps is not positive; `shape` is unknown.

    >>> triangle = ticket_rate(0.1, 10, 4, low=1.0, high=3.0)
    >>> [round(float(triangle(step)), 2) for step in (9, 10, 11, 12, 13, 14)]
    [0.1, 1.0, 2.0, 3.0, 2.0, 1.0]
    """
    check_steps(begin=begin)
    check_count(every=every)
    check_number("low", low)
    check_number("high", high)
    if shape not in ("triangle", "halves"):
        raise ValueError(f'shape must be "triangle" or "halves", got {shape!r}')

    def schedule(step: chex.Numeric) -> jax.Array:
        step = jnp.asarray(step)
        place = (step - begin) % every / every
        if shape == "triangle":
            inside = low + (high - low) * (1 - jnp.abs(2 * place - 1))
        else:
            inside = jnp.where(place < 0.5, high, low)
        return jnp.where(step < begin, rate(step) if callable(rate) else rate, inside)

    return schedule
