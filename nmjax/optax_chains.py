"""Finds out where in an `optax.chain` a transformation runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

Update = Callable[..., Any]

# Transformations of optax that keep the sign of updates, whatever their arguments are.
KEEPING = (
    "adaptive_grad_clip",
    "add_decayed_weights",
    "add_noise",
    "apply_every",
    "centralize",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "ema",
    "identity",
    "scale_by_adadelta",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_amsgrad",
    "scale_by_belief",
    "scale_by_factored_rms",
    "scale_by_lion",
    "scale_by_novograd",
    "scale_by_param_block_norm",
    "scale_by_param_block_rms",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rprop",
    "scale_by_rss",
    "scale_by_sign",
    "scale_by_sm3",
    "scale_by_stddev",
    "scale_by_yogi",
    "trace",
    "zero_nans",
)


def runs_after_flipped_sign() -> bool:
    """Whether the chains that call the caller have flipped the sign before it, and not after it.

    optax has no way to ask for this. So the chains are found on the stack, and the signs of their
    parts are read from the closures. A part that is not recognized counts as keeping the sign
    before the caller. After it, such a part may flip the sign back, and the answer is False.
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
    first, later = math.prod(sign or 1 for sign in _signs(before)), _signs(after)
    return first < 0 and None not in later and math.prod(filter(None, later)) > 0


def _signs(parts: Iterable[Update]) -> list[int | None]:
    return [sign for part in parts for sign in _signs_of(part)]


def _signs_of(update: Any) -> list[int | None]:
    """What a transformation multiplies the sign of every update by, part by part.

    Returns:
      1, -1, or None if that is not certain, for each part of a chain.
    """
    if not inspect.isfunction(update):
        return [None]
    code, inside = update.__code__, inspect.getclosurevars(update).nonlocals
    if _is_made_by("with_extra_args_support", code) and "tx" in inside:
        return _signs_of(inside["tx"].update)
    if _is_made_by("chain", code):
        return _signs(inside.get("update_fns", ()))
    if _is_made_by("scale", code):
        return [_sign(inside.get("step_size"))]
    schedule = inside.get("step_size_fn")
    if inspect.isfunction(schedule) and _is_made_by("scale_by_learning_rate", schedule.__code__):
        # The learning rate is multiplied by this number.
        return [_sign(inspect.getclosurevars(schedule).nonlocals.get("m"))]
    return [1 if any(_is_made_by(maker, code) for maker in KEEPING) else None]


def _sign(number: Any) -> int | None:
    if not isinstance(number, int | float):
        return None
    return -1 if number < 0 else 1


def _is_made_by(maker: str, code: Any) -> bool:
    """Whether a function was defined inside the function `maker` of optax."""
    return code.co_qualname.startswith(f"{maker}.<locals>.") and "optax" in code.co_filename
