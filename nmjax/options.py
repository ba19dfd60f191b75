"""Options of the command line: their parser, as arguments of functions, and in messages."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nmjax._version import __version__
from nmjax.layouts import Axes, GivenAxes

Command = Callable[[argparse.Namespace], None]

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


def make_parser(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Makes the parser of the command line.

    Args:
      run: what each command does, by the command's name; the parsed arguments hold it as `run`.
    """
    parser = argparse.ArgumentParser(
        prog="nmjax", description="Inspect, plan, prune, pack and time weights."
    )
    parser.add_argument("--version", action="version", version=f"nmjax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="info | plan | prune | pack | bench")
    info = _add_command(commands, run, "info", "Show what a packed or safetensors file contains.")
    info.add_argument("file", type=Path, help="a .safetensors file, or the index of several")
    plan = _add_command(commands, run, "plan", "Show what a pattern does to each layer.")
    _add_plan(plan, on_unknown="dense")
    pruning = _add_command(
        commands,
        run,
        "prune",
        "Prune the weights of a checkpoint, and write them dense, under their names.",
    )
    packing = _add_command(commands, run, "pack", "Pack the weights of a checkpoint.")
    for command in (pruning, packing):
        _add_plan(command, on_unknown="error")
        _add_output(command)
    pruning.add_argument(
        "--method",
        choices=("magnitude", "wanda", "ria", "sparse_gpt", "admm", "alps"),
        default="magnitude",
        help="all but magnitude need --statistics (default: %(default)s)",
    )
    pruning.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="a .safetensors file with a tensor for each pruned weight, under the weight's name: "
        "the mean square of each input, or the Gram matrix of the inputs over their number of rows",
    )
    packing.add_argument(
        "--prune", action="store_true", help="prune the weights by magnitude before packing them"
    )
    packing.add_argument(
        "--quantize",
        choices=("int8",),
        help="round the packed weights to integers with one scale for each output",
    )
    bench = _add_command(commands, run, "bench", "Time packed layers against dense ones.")
    bench.add_argument("file", type=Path, help="a file that `nmjax pack` wrote")
    bench.add_argument("--batch", type=_positive, default=1, help="rows or images (default: 1)")
    bench.add_argument(
        "--side", type=_positive, default=14, help="height and width of images (default: 14)"
    )
    bench.add_argument(
        "--threads", type=_numbers, default=(1,), help='thread counts, such as "1,2" (default: 1)'
    )
    return parser


def _add_command(
    commands: Any, run: Mapping[str, Command], name: str, text: str
) -> argparse.ArgumentParser:
    # argparse's own help lines begin in lower case and have no period.
    parser = commands.add_parser(name, help=text[0].lower() + text[1:-1], description=text)
    parser.set_defaults(run=run[name])
    return parser


def _add_plan(parser: argparse.ArgumentParser, *, on_unknown: str) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a .safetensors or .npz file, the index of several .safetensors files or their "
        "folder, or an Orbax checkpoint folder",
    )
    parser.add_argument("--pattern", required=True, help='a pattern such as "2:4" or "1x16@0.9"')
    parser.add_argument(
        "--subtree",
        help='read only this part of the checkpoint, such as "params"; "" for everything '
        "(default: the subtree called params, if there is one)",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=(),
        metavar="RULE",
        help="keep leaves dense if one of these regular expressions matches their path",
    )
    parser.add_argument(
        "--include", nargs="+", metavar="RULE", help="make only matching leaves sparse"
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="RULE=PATTERN",
        help='use another pattern, or "dense", for matching leaves; may be repeated',
    )
    parser.add_argument(
        "--axes",
        action="append",
        default=[],
        metavar="RULE=AXES",
        help="axes that the product sums over, for matching leaves: -2, or -3,-2 for several; "
        "REDUCTION/OUTPUT/TAPS, such as -2/-1/-4,-3, for blocks of weights with more than two "
        "axes; may be repeated",
    )
    parser.add_argument(
        "--on-unknown",
        choices=("error", "dense"),
        default=on_unknown,
        help="what to do with leaves whose axes are neither given nor certain (default: "
        "%(default)s)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the .safetensors file to write; a folder if `prune` is to keep several files",
    )
    parser.add_argument(
        "--dense-if-indivisible",
        action="store_true",
        help="keep layers dense if the pattern does not divide their size (plan always does this)",
    )


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


def _positive(text: str) -> int:
    # `isdecimal` accepts the digits of every script.
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(map(_positive, text.split(",")))
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} has a number twice")
    return numbers
