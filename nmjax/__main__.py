"""The command line: `python -m nmjax info | plan | pack | bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nmjax.analysis.layer_times import layer_times
from nmjax.files.checkpoints import read_checkpoint
from nmjax.files.packed_files import FORMAT, load_packed, save_packed
from nmjax.files.tensor_files import NOTE, read_note, read_tensors
from nmjax.kernels.gpu.cusparselt import check_semi_structured
from nmjax.kernels.matmul import choose, expected_speedup
from nmjax.packed.packing import check_sparse, pack
from nmjax.packed.storage import sizes
from nmjax.packed.weight import Packed, is_packed
from nmjax.plans import Plan, make_plan
from nmjax.tables import text_table
from nmjax.trees.leaves import named_leaves


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with jax.enable_x64(True):  # What a checkpoint holds in 64 bits is not narrowed.
            arguments.run(arguments)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nmjax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="info | plan | pack | bench")
    info = commands.add_parser("info", help="what is in a packed file, or a safetensors file")
    info.add_argument("file", type=Path)
    info.set_defaults(run=_info)
    plan = commands.add_parser("plan", help="what a pattern would make of a checkpoint, by layer")
    _add_plan(plan)
    plan.set_defaults(run=_plan)
    packing = commands.add_parser("pack", help="write the packed weights of a checkpoint")
    _add_plan(packing)
    packing.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    packing.add_argument(
        "--prune", action="store_true", help="drop what the pattern does not keep, by magnitude"
    )
    packing.add_argument(
        "--dense-if-indivisible",
        action="store_true",
        help="leave a layer dense whose size the pattern does not divide, as plan always does",
    )
    packing.set_defaults(run=_pack)
    bench = commands.add_parser("bench", help="times packed layers here against dense ones")
    bench.add_argument("file", type=Path, help="what pack wrote")
    bench.add_argument("--batch", type=_positive, default=1, help="rows, or images; default 1")
    bench.add_argument(
        "--side", type=_positive, default=14, help="pixels along an image; default 14"
    )
    bench.add_argument(
        "--threads", type=_numbers, default=(1,), help='such as "1,2"; default one thread'
    )
    bench.set_defaults(run=_bench)
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help=".safetensors, .npz, or a folder of orbax")
    parser.add_argument("--pattern", required=True, help='such as "2:4" or "1x16@0.9"')
    parser.add_argument("--subtree", default="", help='what to take, such as "params"')
    parser.add_argument("--exclude", nargs="+", default=(), metavar="RULE", help="left dense")
    parser.add_argument("--include", nargs="+", metavar="RULE", help="only these become sparse")
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="RULE=PATTERN",
        help='another pattern, or "dense", for the leaves that a regular expression matches',
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
    params = read_checkpoint(arguments.checkpoint, arguments.subtree)
    plan = _make_plan(params, arguments, on_indivisible="dense")
    print(plan)
    packed = jax.eval_shape(lambda params: pack(params, plan), params)
    print(f"\n{sizes(packed)}\n\n{_products(packed)}")


def _pack(arguments: argparse.Namespace) -> None:
    params = read_checkpoint(arguments.checkpoint, arguments.subtree)
    dense = "dense" if arguments.dense_if_indivisible else "error"
    plan = _make_plan(params, arguments, on_indivisible=dense)
    if not arguments.prune:
        try:
            check_sparse(params, plan)
        except ValueError as error:
            raise ValueError(f"{error}\nPass --prune to prune them here, by magnitude.") from error
    packed = pack(params, plan)
    save_packed(arguments.out, packed)
    print(sizes(packed))
    print(f"\n{arguments.out}: {arguments.out.stat().st_size:,} bytes")


def _bench(arguments: argparse.Namespace) -> None:
    print(layer_times(arguments.file, arguments.batch, arguments.side, arguments.threads))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(_positive, text.split(",")))


def _make_plan(params: Any, arguments: argparse.Namespace, *, on_indivisible: Any) -> Plan:
    rules = {}
    for text in arguments.rule:
        rule, equals, pattern = text.rpartition("=")
        if not equals:
            raise ValueError(f"--rule {text!r} should read RULE=PATTERN, such as 'head=1:4'")
        rules[rule] = None if pattern == "dense" else pattern
    try:
        return make_plan(
            params,
            arguments.pattern,
            exclude=arguments.exclude,
            include=arguments.include,
            rules=rules,
            on_indivisible=on_indivisible,
        )
    except ValueError as error:  # What it proposes is said in the words of this command.
        options = {'on_indivisible="dense"': "--dense-if-indivisible", "exclude=": "--exclude"}
        text = str(error)
        for keyword, option in options.items():
            text = text.replace(keyword, option)
        raise ValueError(text) from error


def _products(packed: Any) -> str:
    """How `nmjax.packed_matmul` would compute each packed leaf on this machine, as a table."""
    rows: list[tuple[str, str, str, str, str]] = []
    for name, leaf in named_leaves(packed, is_leaf=is_packed).items():
        if is_packed(leaf):
            layer = jax.eval_shape(lambda leaf: leaf.first_layer(), leaf)
            way, speedup = choose(leaf.dtype, layer, 1), expected_speedup(leaf.dtype, layer)
            fits = "yes" if _is_semi_structured(layer) else "no"
            rows.append((name, way.name, f"{speedup:.1f}" if speedup else "?", fits, way.reason))
    header = ("leaf", "one row is multiplied by", "speed-up", "2:4 on GPUs", "because")
    return (
        f"{text_table(header, rows, right=(2,))}\n"
        "2:4 on GPUs: whether sparse tensor cores can multiply by the leaf in 16-bit numbers.\n"
        "speed-up: over the dense product, as measured with 256 rows, or an image of 14 x 14, on "
        "one thread with AVX-512; `python -m nmjax bench` measures here."
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
