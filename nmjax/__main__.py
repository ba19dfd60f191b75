"""Inspect, plan, prune, pack and time weights: `nmjax info | plan | prune | pack | bench`."""

from __future__ import annotations

import argparse
import gc
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nmjax.analysis.layer_times import layer_times
from nmjax.files.checkpoints import Checkpoint, open_checkpoint
from nmjax.files.packed_files import open_packed
from nmjax.files.packed_manifest import FORMAT
from nmjax.files.statistics_files import Calibrated
from nmjax.files.tensor_files import NOTE, TensorFile, read_note
from nmjax.files.tensorwise.packed_checkpoints import packed_shapes, write_packed
from nmjax.files.tensorwise.pruned_checkpoints import (
    PruneOne,
    check_output,
    is_folder,
    prune_in_slabs,
    write_pruned,
)
from nmjax.files.tensorwise.shards import ShardedFile, is_sharded, open_safetensors
from nmjax.files.whole_files import check_target
from nmjax.kernels.gpu.cusparselt import check_semi_structured
from nmjax.kernels.matmul import choose, expected_speedup
from nmjax.options import as_options, make_parser, parse_axes, split_rules
from nmjax.packed.storage import sizes
from nmjax.packed.weight import Packed, is_packed
from nmjax.planning import make_plan
from nmjax.plans import DenseLeaf, Plan
from nmjax.post_training._prune_with import METHODS
from nmjax.tables import printable, text_table
from nmjax.trees.leaves import named_leaves, nest

# What shells report for a program that a closed pipe, or Ctrl-C, has ended.
_PIPE_CLOSED, _INTERRUPTED = 141, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = make_parser(_COMMANDS).parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names may have letters that the terminal lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Otherwise JAX would narrow 64-bit arrays of the checkpoint.
        with jax.enable_x64(True), _rare_collections():
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # The reader, such as `head`, has enough.
        # Otherwise Python complains when it flushes the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except MemoryError as error:
        return _fail(f"there is not enough memory. {error}")
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        return _fail(as_options(str(error)))
    return 0


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Lets Python look for cycles of dead objects less often.

    A file may have a hundred thousand tensors, and their names and shapes make millions of objects
    that stay alive. Looking through them again and again took 40 % of the time.
    """
    usual = gc.get_threshold()
    gc.set_threshold(100_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _fail(message: str) -> int:
    # Messages quote names from files. Line breaks are the messages' own.
    print("error:", "\n".join(map(printable, message.split("\n"))), file=sys.stderr)
    return 1


def _info(arguments: argparse.Namespace) -> None:
    file = open_safetensors(arguments.file)
    if isinstance(file, TensorFile) and read_note(file.metadata).get("format") == FORMAT:
        # Each leaf is read, which checks it, but only its shapes are kept.
        opened = open_packed(file)
        leaves = {
            name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaf)
            for name, leaf in opened.read()
        }
        packed = nest(leaves)
        print(f"{sizes(packed)}\n\n{_products(packed)}")
        if opened.manifest.left_out:
            names = ", ".join(map(printable, opened.manifest.left_out))
            print(f"Not stored, because they are not arrays: {names}")
    else:
        header = ("tensor", "shape", "dtype", "bytes", "zeros")
        print(text_table(header, _tensor_rows(file), right=(3, 4)))
    for key, text in file.metadata.items():
        if key != NOTE:
            print(f"{printable(key)}: {printable(text)}")
    print(f"\n{arguments.file}: {file.nbytes:,} bytes")


def _tensor_rows(file: TensorFile | ShardedFile) -> list[tuple[str, str, str, str, str]]:
    readable = [name for name, tensor in file.tensors.items() if tensor.dtype is not None]
    # One tensor at a time is in memory.
    zeros = {
        name: f"{1 - np.count_nonzero(array) / array.size:.1%}" if array.size else "100.0%"
        for name, array in file.read(readable)
    }
    # NumPy takes long to spell a dtype.
    spelled = {x.code: x.dtype or x.code for x in file.tensors.values()}
    dtypes = {code: str(dtype) for code, dtype in spelled.items()}
    return [
        (
            name,
            "x".join(map(str, x.shape)),
            dtypes[x.code],
            f"{x.nbytes:,}",
            zeros.get(name, "?"),
        )
        for name, x in file.tensors.items()
    ]


def _plan(arguments: argparse.Namespace) -> None:
    checkpoint = _open(arguments)
    _warn_left_out(checkpoint)
    shapes = checkpoint.shapes
    with _slashes_noted(checkpoint):
        # A table that says why a layer stays dense is more useful here than an error.
        plan = _make_plan(shapes, arguments, on_indivisible="dense")
    print(as_options(str(plan)))
    if not plan.warning:  # Otherwise the table ends with it.
        print(_unknown_axes(plan), end="")
    # Sizes and products follow from shapes, so nothing is read or packed here.
    packed = nest(packed_shapes(checkpoint, plan))
    print(f"\n{sizes(packed)}\n\n{_products(packed)}")


def _prune(arguments: argparse.Namespace) -> None:
    checkpoint = _open_for_output(arguments)
    for name, code in checkpoint.left_out.items():
        print(f"{printable(name)} of dtype {code}, which NumPy and JAX lack, is copied.\n")
    with _slashes_noted(checkpoint):
        plan = _plan_output(checkpoint, arguments)
        files = write_pruned(arguments.out, checkpoint, plan, _method(arguments, checkpoint, plan))
    print(as_options(str(plan)))
    _print_output(arguments, plan, files)


def _method(arguments: argparse.Namespace, checkpoint: Checkpoint, plan: Plan) -> PruneOne:
    """What prunes each leaf."""
    if (arguments.method == "magnitude") != (arguments.statistics is None):
        raise ValueError(
            f"--method {arguments.method} "
            + ("needs" if arguments.statistics is None else "does not use")
            + " --statistics"
        )
    if arguments.statistics is None:
        return lambda name, leaf, w: prune_in_slabs(leaf, w)
    keys = {name: str(x.key) for name, x in named_leaves(checkpoint.tree).items()}
    return Calibrated(*METHODS[arguments.method], arguments.statistics, plan, keys)


def _pack(arguments: argparse.Namespace) -> None:
    checkpoint = _open_for_output(arguments)
    _warn_left_out(checkpoint)
    with _slashes_noted(checkpoint):
        plan = _plan_output(checkpoint, arguments)
        rounding = {"quantized": arguments.quantize}
        write_packed(arguments.out, checkpoint, plan, prune=arguments.prune, **rounding)
    print(sizes(nest(packed_shapes(checkpoint, plan, **rounding))))
    _print_output(arguments, plan, [arguments.out])


def _open_for_output(arguments: argparse.Namespace) -> Checkpoint:
    """Opens a checkpoint after checking that the output can be written and does not replace it."""
    out = arguments.out
    if arguments.run is _pack or not (is_folder(out) and is_sharded(arguments.checkpoint)):
        check_target(out)
    checkpoint = _open(arguments)
    check_output(out, checkpoint)
    return checkpoint


def _plan_output(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Plan:
    dense = "dense" if arguments.dense_if_indivisible else "error"
    return _make_plan(checkpoint.shapes, arguments, on_indivisible=dense)


def _print_output(arguments: argparse.Namespace, plan: Plan, files: Sequence[Path]) -> None:
    print(_unknown_axes(plan), end="")
    print(f"\n{arguments.out}: {sum(file.stat().st_size for file in files):,} bytes")


def _bench(arguments: argparse.Namespace) -> None:
    print(layer_times(arguments.file, arguments.batch, arguments.side, arguments.threads))


def _open(arguments: argparse.Namespace) -> Checkpoint:
    """Reads the names and shapes of a checkpoint, and says what is left out of it."""
    checkpoint = open_checkpoint(arguments.checkpoint)
    if arguments.subtree is not None:
        checkpoint = checkpoint.part(arguments.subtree)
    else:
        checkpoint = checkpoint.params()
        if checkpoint.where:
            print(
                f"Only {printable(checkpoint.where)} is read; the rest of the checkpoint is left "
                "out. Pass --subtree to choose another part.\n"
            )
    return checkpoint


def _warn_left_out(checkpoint: Checkpoint) -> None:
    for name, code in checkpoint.left_out.items():
        print(f"WARNING: {printable(name)} is left out, because NumPy and JAX have no {code}.\n")


@contextmanager
def _slashes_noted(checkpoint: Checkpoint) -> Iterator[None]:
    """Adds to errors that the names in them have slashes for PyTorch's dots."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if not checkpoint.from_torch:
            raise
        note = "The names are PyTorch's, with slashes in place of dots."
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{error}\n{note}") from error


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


_COMMANDS = {"info": _info, "plan": _plan, "prune": _prune, "pack": _pack, "bench": _bench}


if __name__ == "__main__":
    sys.exit(main())
