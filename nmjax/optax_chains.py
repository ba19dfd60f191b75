"""Finds out where in an `optax.chain` a transformation runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

Update = Callable[..., Any]


def runs_after_flipped_sign() -> bool:
    """Whether the chains that call the caller have flipped the sign before it, and not after it.

    optax has no way to ask for this. So the chains are found on the stack, and the signs of their
    parts are read from the closures. Whatever is not recognized counts as keeping the sign.
    """
    before: list[Update] = []
    after: list[Update] = []
    frame = inspect.currentframe()
    while frame is not None:
        if _is_made_by("chain", frame.f_code):
            parts = frame.f_locals.get("update_fns", ())
            # The chain collects the states of the parts that have run.
            place = len(frame.f_locals.get("new_state", ()))
            before += parts[:place]
            after += parts[place + 1 :]
        frame = frame.f_back
    return _flips(before) and not _flips(after)


def _flips(parts: Sequence[Update]) -> bool:
    return sum(map(_flips_sign, parts)) % 2 == 1


def _flips_sign(update: Any) -> bool:
    """Whether a transformation is certain to flip the sign of every update."""
    if not inspect.isfunction(update):
        return False
    inside = inspect.getclosurevars(update).nonlocals
    if _is_made_by("with_extra_args_support", update.__code__):
        return "tx" in inside and _flips_sign(inside["tx"].update)
    if _is_made_by("chain", update.__code__):
        return _flips(inside.get("update_fns", ()))
    if _is_made_by("scale", update.__code__):
        return _is_negative(inside.get("step_size"))
    schedule = inside.get("step_size_fn")
    if _is_made_by("scale_by_schedule", update.__code__) and inspect.isfunction(schedule):
        # `optax.scale_by_learning_rate` multiplies its schedule by this number.
        return _is_negative(inspect.getclosurevars(schedule).nonlocals.get("m"))
    return False


def _is_negative(number: Any) -> bool:
    return isinstance(number, int | float) and number < 0


def _is_made_by(maker: str, code: Any) -> bool:
    """Whether a function was defined inside the function `maker` of optax."""
    return code.co_qualname.startswith(f"{maker}.<locals>.") and "optax" in code.co_filename
