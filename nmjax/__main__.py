"""Inspect, plan, pack and time sparse weights: `nmjax info | plan | pack | bench`."""

from __future__ import annotations

import argparse
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nmjax._version import __version__
from nmjax.analysis.layer_times import layer_times
from nmjax.files.checkpoints import read_checkpoint, read_params
from nmjax.files.packed_files import FORMAT, load_packed, save_packed
from nmjax.files.tensor_files import NOTE, read_note, read_tensors
from nmjax.kernels.gpu.cusparselt import check_semi_structured
from nmjax.kernels.matmul import choose, expected_speedup
from nmjax.options import as_options, parse_axes, split_rules
from nmjax.packed.packing import check_sparse, pack
from nmjax.packed.storage import sizes
from nmjax.packed.weight import Packed, is_packed
from nmjax.planning import make_plan
from nmjax.plans import DenseLeaf, Plan
from nmjax.pruning import compute_masks
from nmjax.tables import text_table
from nmjax.trees.leaves import named_leaves


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with jax.enable_x64(True):  # Otherwise JAX would narrow 64-bit arrays of the checkpoint.
            arguments.run(arguments)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        print(f"error: {as_options(str(error))}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nmjax", description="Inspect, plan, pack and time sparse weights."
    )
    parser.add_argument("--version", action="version", version=f"nmjax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="info | plan | pack | bench")
    info = _add_command(commands, "info", _info, "Show what a packed or safetensors file contains.")
    info.add_argument("file", type=Path, help="a .safetensors file")
    plan = _add_command(commands, "plan", _plan, "Show what a pattern does to each layer.")
    _add_plan(plan, on_unknown="dense")
    packing = _add_command(commands, "pack", _pack, "Pack the weights of a checkpoint.")
    _add_plan(packing, on_unknown="error")
    packing.add_argument(
        "--out", type=Path, required=True, help="the .safetensors file to write", metavar="FILE"
    )
    packing.add_argument(
        "--prune", action="store_true", help="prune the weights by magnitude before packing them"
    )
    packing.add_argument(
        "--dense-if-indivisible",
        action="store_true",
        help="keep layers dense if the pattern does not divide their size (plan always does this)",
    )
    bench = _add_command(commands, "bench", _bench, "Time packed layers against dense ones.")
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
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    # argparse's own help lines begin in lower case and have no period.
    parser = commands.add_parser(name, help=text[0].lower() + text[1:-1], description=text)
    parser.set_defaults(run=run)
    return parser


def _add_plan(parser: argparse.ArgumentParser, *, on_unknown: str) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="a .safetensors or .npz file, or an Orbax checkpoint folder"
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


def _info(arguments: argparse.Namespace) -> None:
    tensors, metadata = read_tensors(arguments.file)
    if read_note(metadata).get("format") == FORMAT:
        packed = load_packed(arguments.file)
        print(f"{sizes(packed)}\n\n{_products(packed)}")
    else:
        rows = [
            (name, "x".join(map(str, x.shape)), str(x.dtype), f"{x.nbytes:,}", f"{_zeros(x):.1%}")
            for name, x in sorted(tensors.items())
        ]
        print(text_table(("tensor", "shape", "dtype", "bytes", "zeros"), rows, right=(3, 4)))
    for key, text in metadata.items():
        if key != NOTE:
            print(f"{key}: {text}")
    print(f"\n{arguments.file}: {arguments.file.stat().st_size:,} bytes")


def _plan(arguments: argparse.Namespace) -> None:
    params = _read(arguments)
    # A table that says why a layer stays dense is more useful here than an error.
    plan = _make_plan(params, arguments, on_indivisible="dense")
    print(as_options(str(plan)))
    if not plan.warning:  # Otherwise the table ends with it.
        print(_unknown_axes(plan), end="")
    # Sizes and products follow from shapes, so nothing is packed here.
    packed = jax.eval_shape(lambda params: _packed(params, plan), params)
    print(f"\n{sizes(packed)}\n\n{_products(packed)}")


def _pack(arguments: argparse.Namespace) -> None:
    params = _read(arguments)
    dense = "dense" if arguments.dense_if_indivisible else "error"
    plan = _make_plan(params, arguments, on_indivisible=dense)
    # `pack` itself keeps the largest weights and would prune silently.
    if not arguments.prune:
        try:
            check_sparse(params, plan)
        except ValueError as error:
            raise ValueError(f"{error}\nPass --prune to prune them by magnitude.") from error
    packed = _packed(params, plan)
    save_packed(arguments.out, packed)
    print(sizes(packed))
    print(_unknown_axes(plan), end="")
    print(f"\n{arguments.out}: {arguments.out.stat().st_size:,} bytes")


def _bench(arguments: argparse.Namespace) -> None:
    print(layer_times(arguments.file, arguments.batch, arguments.side, arguments.threads))


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(map(_positive, text.split(",")))
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return numbers


def _read(arguments: argparse.Namespace) -> Any:
    if arguments.subtree is not None:
        return read_checkpoint(arguments.checkpoint, arguments.subtree)
    params, subtree = read_params(arguments.checkpoint)
    if subtree:
        print(
            f"Only {subtree} is read; the rest of the checkpoint is left out. Pass --subtree to "
            "choose another part.\n"
        )
    return params


def _make_plan(params: Any, arguments: argparse.Namespace, *, on_indivisible: Any) -> Plan:
    rules = {
        rule: None if pattern == "dense" else pattern
        for rule, pattern in split_rules(arguments.rule, "--rule", "PATTERN", "head=1:4")
    }
    axes = {
        rule: parse_axes(text)
        for rule, text in split_rules(arguments.axes, "--axes", "AXES", "head/kernel=-2")
    }
    return make_plan(
        params,
        arguments.pattern,
        exclude=arguments.exclude,
        include=arguments.include,
        rules=rules,
        axes=axes,
        on_indivisible=on_indivisible,
        on_unknown=arguments.on_unknown,
    )


def _packed(params: Any, plan: Plan) -> Any:
    with warnings.catch_warnings():
        # The commands print this warning themselves, because it names arguments of functions.
        warnings.filterwarnings("ignore", message=re.escape(plan.warning or "WARNING"))
        return pack(params, plan, compute_masks(params, plan))


def _unknown_axes(plan: Plan) -> str:
    """A warning that some leaves stay dense only because their axes are unknown, or nothing."""
    shapes = {
        name: leaf.shape
        for name, leaf in plan.leaves
        if isinstance(leaf, DenseLeaf) and leaf.is_unknown
    }
    if not shapes:
        return ""
    unknown = sum(map(math.prod, shapes.values()))
    total = sum(math.prod(leaf.shape) for _, leaf in plan.leaves)
    return (
        f"\nWARNING: {unknown:,} of {total:,} parameters ({unknown / total:.0%}) stay dense, "
        f"because they have unknown axes. Pass --axes 'RULE=AXES' for {', '.join(shapes)}.\n"
    )


def _products(packed: Any) -> str:
    """A table of how `nmjax.packed_matmul` would multiply by each packed leaf on this machine."""
    rows: list[tuple[str, str, str, str, str]] = []
    for name, leaf in named_leaves(packed, is_leaf=is_packed).items():
        if is_packed(leaf):
            # The layers of a stack have one shape, so the first stands for all.
            layer = jax.eval_shape(lambda leaf: leaf.first_layer(), leaf)
            way, speedup = choose(leaf.dtype, layer, 1), expected_speedup(leaf.dtype, layer)
            fits = "yes" if _is_semi_structured(layer) else "no"
            rows.append((name, way.name, f"{speedup:.1f}" if speedup else "?", fits, way.reason))
    header = ("leaf", "product for one row", "speed-up", "2:4 on GPUs", "because")
    return (
        f"{text_table(header, rows, right=(2,))}\n"
        "2:4 on GPUs: whether sparse tensor cores can multiply by the leaf in 16-bit precision.\n"
        "speed-up: over the dense product, measured on one AVX-512 thread with 256 rows or a "
        "14 x 14 image. Run `python -m nmjax bench` to measure on this machine."
    )


def _is_semi_structured(layer: Packed) -> bool:
    try:
        check_semi_structured(layer)
    except NotImplementedError:
        return False
    return True


def _zeros(x: np.ndarray) -> float:
    return 1 - np.count_nonzero(x) / max(x.size, 1)


if __name__ == "__main__":
    sys.exit(main())
