"""Times packed layers on this machine, next to their dense products."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.analysis.timing import interleaved_times, output_on_cores
from nmjax.files.packed_files import open_packed
from nmjax.files.tensor_files import open_tensors
from nmjax.kernels.matmul import choose, packed_conv, packed_matmul
from nmjax.packed.weight import Packed
from nmjax.tables import text_table

_HEADER = (
    "leaf",
    "pattern",
    "product",
    "implementation",
    "threads",
    "dense ms",
    "packed ms",
    "dense / packed",
)


def layer_times(file: Path, batch: int, side: int, threads: Sequence[int]) -> str:
    """Makes a table of a file's packed layers: dense and packed milliseconds, and their ratio.

    Each thread count is measured in a process of its own, restricted to that many cores, because
    XLA creates its threads only once.

    Args:
      file: a file that `nmjax.save_packed` wrote.
      batch: rows of a matrix product, or images of a convolution.
      side: height and width of the images, in pixels; strides are 1.
      threads: thread counts.

    Raises:
      ValueError: nothing in the file is packed, or there are fewer cores than threads.
      OSError, RuntimeError: the file cannot be read, or a process failed.
    """
    _packed_leaves(file)  # Raises before any process starts.
    rows = {count: _rows_in_a_process(file, batch, side, count) for count in threads}
    table = [
        (*row["layer"], str(count), f"{row['dense']:.4g}", f"{row['packed']:.4g}",
         f"{row['dense'] / row['packed']:.2f}")
        for layer in zip(*rows.values(), strict=True)
        for count, row in zip(threads, layer, strict=True)
    ]  # fmt: skip
    lines = [text_table(_HEADER, table, right=(4, 5, 6, 7))]
    totals = {
        count: {side: sum(row[side] for row in rows[count]) for side in ("dense", "packed")}
        for count in threads
    }
    for count, total in totals.items():
        lines.append(
            f"{count} thread{'s' * (count > 1)}: dense {total['dense']:.4g} ms, packed "
            f"{total['packed']:.4g} ms, {total['dense'] / total['packed']:.2f} times as fast"
        )
    if len(threads) > 1:
        first, last = threads[0], threads[-1]
        gains = {side: totals[first][side] / totals[last][side] for side in totals[first]}
        lines.append(
            f"{last} threads over {first}: packed {gains['packed']:.2f}, dense {gains['dense']:.2f}"
        )
    return "\n".join(lines)


def measure(file: Path, batch: int, side: int) -> list[dict[str, Any]]:
    """Measures the rows of `layer_times` in this process, in milliseconds."""
    leaves = _packed_leaves(file)
    return [_measure_leaf(name, leaf, batch, side) for name, leaf in leaves.items()]


def _packed_leaves(file: Path) -> dict[str, Packed]:
    opened = open_packed(open_tensors(file))
    packed = {name: opened.on_device(name, leaf) for name, leaf in opened.read_packed()}
    if not packed:
        raise ValueError(f"{file}: none of its {len(opened.dense)} leaves is packed")
    return packed


def _measure_leaf(name: str, leaf: Packed, batch: int, side: int) -> dict[str, Any]:
    leaf = leaf.first_layer()
    taps = leaf.kernel_taps
    shape = _input_shape(leaf, batch, side)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), leaf.dtype)
    w = jax.jit(lambda packed: packed.unpack())(leaf)
    dense = jax.jit(partial(_dense, leaf))
    multiply = jax.jit(packed_conv if taps else packed_matmul)
    # Strides are 1, so a convolution has an output for every pixel.
    way = choose(leaf.dtype, leaf, batch * side ** len(taps))
    sides = {"dense": lambda: dense(x, w), "packed": lambda: multiply(x, leaf)}
    if way.name == "xla":  # Both are the same product then, so it is timed once.
        del sides["packed"]
    times = interleaved_times(sides, at_least=0.01)
    times = {"packed": times["dense"], **times}
    sizes = "x".join(map(str, (*taps, *shape[1 + len(taps) :])))
    product = f"{'conv' if taps else 'matmul'} {'x'.join(map(str, shape))} by {sizes}"
    return {
        "layer": (
            name, str(leaf.leaf_plan.pattern), f"{product}x{leaf.outputs}", way.name
        ),
        **{side: statistics.median(seconds) * 1e3 for side, seconds in times.items()},
    }  # fmt: skip


def _input_shape(leaf: Packed, batch: int, side: int) -> tuple[int, ...]:
    taps, inputs = leaf.kernel_taps, leaf.reduction_shape
    # A filter's groups may run over its taps too: then only the first reduction axis holds
    # channels.
    return (batch, *(side,) * len(taps), *(inputs[:1] if taps else inputs))


def _dense(leaf: Packed, x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies by the unpacked weight with XLA."""
    plan = leaf.leaf_plan
    axes = (*plan.reduction_axes, *plan.output_axes)
    taps = [axis for axis in range(-w.ndim, 0) if axis not in axes]
    # With groups over a whole filter the taps are reduction axes after the first.
    if leaf.kernel_taps:
        taps, inputs = taps or list(plan.reduction_axes[1:]), plan.reduction_axes[0]
        w = w.transpose(*taps, inputs, *plan.output_axes)
        letters = "HWD"[: len(taps)]
        numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
        return jax.lax.conv_general_dilated(
            x, w, (1,) * len(taps), "SAME", dimension_numbers=numbers
        )
    x_axes = range(x.ndim - len(plan.reduction_axes), x.ndim)
    return jnp.tensordot(x, w, (tuple(x_axes), plan.reduction_axes))


def _rows_in_a_process(file: Path, batch: int, side: int, threads: int) -> list[dict[str, Any]]:
    """Runs `measure` in a process with this many threads."""
    program = (
        "import json, sys; from pathlib import Path; "
        "from nmjax.analysis.layer_times import measure; "
        "print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))"
    )
    command = [sys.executable, "-c", program, str(file), str(batch), str(side)]
    return json.loads(output_on_cores(command, threads))
