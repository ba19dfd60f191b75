"""Options of the command line: as arguments of functions, and in messages in place of those."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nmjax.layouts import Axes, GivenAxes

# Advice in messages of the library -> the same for the command line, in order. The command line has
# no option for a forward pass.
_OPTIONS = {
    r"pass forward= and inputs= to read the axes off your program, ": "",
    r"Pass forward= and inputs=, or axes=, to make_plan": "Pass --axes 'RULE=AXES'",
    r"\baxes=\{path rule: axes\}": "--axes 'RULE=AXES'",
    r"\baxes=\{(['\"])(.+?)\1: nmjax\.Axes\(reduction=\.\.\., output=\.\.\., taps=\.\.\.\)\}": (
        r"--axes '\2=REDUCTION/OUTPUT/TAPS'"
    ),
    r"\baxes=\{(['\"])(.+?)\1: \(?([^()]+?),?\)?\}": r"--axes '\2=\3'",
    r'\bon_indivisible="dense"': "--dense-if-indivisible",
    r'\bon_unknown="dense"': "--on-unknown dense",
    r"\b(axes|exclude|include|subtree)=": r"--\1",
    r"\brules=": "--rule",
}


def split_rules(
    texts: Sequence[str], option: str, value: str, example: str
) -> list[tuple[str, str]]:
    """Splits each RULE=VALUE at the last equals sign, because rules may contain others."""
    pairs = []
    for text in texts:
        rule, equals, after = text.rpartition("=")
        if not equals:
            raise ValueError(f"{option} must be RULE={value}, such as {example!r}, got {text!r}")
        pairs.append((rule, after))
    return pairs


def parse_axes(text: str) -> GivenAxes:
    """Reads reduction axes, or reduction, output and tap axes.

    >>> parse_axes("-3,-2")
    (-3, -2)
    >>> parse_axes("-2/-1/-4,-3")
    Axes(reduction=(-2,), output=(-1,), taps=(-4, -3))
    """
    try:
        reduction, *others = (
            tuple(_integer(axis) for axis in span.split(",") if axis.strip())
            for span in text.split("/")
        )
        return Axes(reduction, *others) if others else reduction
    except (TypeError, ValueError):  # Text that is not a number, or more than three spans.
        raise ValueError(
            "--axes must be RULE=AXES with AXES such as -2, -3,-2 or -2/-1/-4,-3 "
            f"(REDUCTION/OUTPUT/TAPS), got {text!r}"
        ) from None


def _integer(text: str) -> int:
    if not text.isascii():  # `int` reads the digits of every script.
        raise ValueError(f"{text!r} has digits other than 0 to 9")
    return int(text)


def as_options(text: str) -> str:
    """Names options of the command line where a message names arguments of functions.

    >>> as_options("pass axes={'a/w$': ...}, or list it in exclude=")
    "pass --axes 'a/w$=...', or list it in --exclude"
    """
    for argument, option in _OPTIONS.items():
        text = re.sub(argument, option, text)
    return text
