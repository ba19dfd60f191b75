"""Products with packed weights against dense ones: `python -m experiments.benchmarks.packed`.

The baseline of each row is XLA's dense product or, if it is installed and faster, PyTorch's. Each
number of threads runs in a process of its own, pinned to as many cores, since thread pools are made
once. Every row is timed with `implementation="ffi"`; the column "chosen" has the default.

The balance of threads is the fastest round with one thread over the fastest with two: on a virtual
machine the second core is sometimes busy for others, which a median would include.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nmjax
from experiments.benchmarks.timing import (
    interleaved_times,
    print_table,
    rows_by_threads,
    write_results,
)
from nmjax.kernels.matmul import choose

SPARSITIES = (0.5, 0.75, 0.875, 0.9, 0.95)
MATMULS = ((256, 4096), (32, 1024), (1, 4096))
CONVOLUTIONS = (
    # images, pixels a side, inputs, outputs, taps a side, stride
    (1, 14, 256, 256, 3, 1),
    (8, 14, 256, 256, 3, 1),
    (1, 14, 256, 256, 3, 2),
    (8, 14, 256, 256, 3, 2),
    (1, 14, 1024, 256, 1, 1),
    (8, 14, 1024, 256, 1, 1),
    (1, 28, 512, 512, 1, 2),
)
GROUPS = (
    (1, 4096, ("2:4", "1:4", "1:16")),
    (256, 1024, ("2:4", "1:4", "1:8", "1:16")),
)


class Case(NamedTuple):
    """One product: its dense operands, and how to pack and compute it."""

    work: str
    pattern: str
    x: jax.Array
    w: jax.Array
    stride: int = 1


def cases() -> Iterator[Case]:
    """What is measured."""
    for batch, size in MATMULS:
        for sparsity in SPARSITIES:
            yield matmul(batch, size, f"1x16@{sparsity}")
    for sparsity in SPARSITIES:
        yield matmul(256, 4096, f"1x16@{sparsity}/layer")
    for sparsity in (0.75, 0.9, 0.95):
        yield matmul(256, 4096, f"1x16@{sparsity}", jnp.bfloat16)
    for images, side, inputs, outputs, taps, stride in CONVOLUTIONS:
        for sparsity in (0.5, 0.75, 0.9):
            yield Case(
                f"conv {taps}x{taps}/{stride} {images}x{side}x{side}x{inputs} -> {outputs}",
                f"1x16@{sparsity}",
                numbers((images, side, side, inputs)),
                numbers((taps, taps, inputs, outputs)),
                stride,
            )
    for batch, size, patterns in GROUPS:
        for pattern in patterns:
            yield matmul(batch, size, pattern)


def matmul(batch: int, size: int, pattern: str, dtype: Any = jnp.float32) -> Case:
    """A square weight."""
    x, w = numbers((batch, size), dtype), numbers((size, size), dtype)
    return Case(f"matmul {batch} x {size} x {size} {jnp.dtype(dtype).name}", pattern, x, w)


def numbers(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal random numbers."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Milliseconds of each side, and the ratio to the faster dense one."""
    params = {"layer": {"kernel": case.w}}
    axes = nmjax.Axes((-2,), (-1,), tuple(range(-case.w.ndim, -2)))
    plan = nmjax.make_plan(params, case.pattern, axes={"kernel": axes})
    packed = nmjax.pack(nmjax.prune(params, plan), plan)["layer"]["kernel"]
    functions = dense_functions(case)
    sparse = jax.jit(
        partial(nmjax.packed_conv, strides=case.stride, implementation="ffi")
        if case.x.ndim == 4
        else partial(nmjax.packed_matmul, implementation="ffi")
    )
    functions["packed"] = lambda: sparse(case.x, packed)
    times = interleaved_times(functions, rounds=rounds, at_least=0.05, pause=0.02)
    seconds = {name: statistics.median(rounds) for name, rounds in times.items()}
    fastest = min(time for name, time in seconds.items() if name != "packed")
    # Rows of a product; in a convolution every pixel is one.
    batch = case.x.size // case.x.shape[-1]
    return {
        "work": case.work,
        "pattern": case.pattern,
        **{f"{name}_ms": time * 1e3 for name, time in seconds.items()},
        "speedup": fastest / seconds["packed"],
        "packed_best_ms": min(times["packed"]) * 1e3,
        "chosen": choose(case.x.dtype, packed, batch).name,
    }


def dense_functions(case: Case) -> dict[str, Callable[[], Any]]:
    """XLA's and PyTorch's dense product."""
    if case.x.ndim == 4:
        compiled = jax.jit(
            lambda x, w: jax.lax.conv_general_dilated(
                x, w, (case.stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
    else:
        compiled = jax.jit(jnp.matmul)
    functions: dict[str, Callable[[], Any]] = {"xla": lambda: compiled(case.x, case.w)}
    try:
        import torch
    except ImportError:
        return functions

    def tensor(x: jax.Array) -> Any:
        dtype = torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32
        # Through float32, which holds it exactly: PyTorch cannot read JAX's bfloat16 from NumPy.
        return torch.tensor(np.asarray(x, np.float32)).to(dtype)

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    if case.x.ndim == 4:
        last = torch.channels_last
        x = tensor(case.x).permute(0, 3, 1, 2).contiguous(memory_format=last)
        w = tensor(case.w).permute(3, 2, 0, 1).contiguous(memory_format=last)
        padding = case.w.shape[0] // 2
        functions["torch"] = lambda: torch.nn.functional.conv2d(
            x, w, stride=case.stride, padding=padding
        )
    else:
        # PyTorch's own layout of a weight, (outputs, inputs).
        rows, columns = tensor(case.x), tensor(case.w).T.contiguous()
        functions["torch"] = lambda: torch.nn.functional.linear(rows, columns)
    return functions


def balance(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much faster two threads are than one, row by row."""
    return [
        {
            "work": alone["work"],
            "pattern": alone["pattern"],
            "two_over_one": alone["packed_best_ms"] / both["packed_best_ms"],
        }
        for alone, both in zip(one, two, strict=True)
    ]


def main() -> None:
    """Runs one process for each number of threads; prints tables and writes them to results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each side")
    parser.add_argument("--only", default="", help="text that a row's work or pattern contains")
    parser.add_argument("--here", action="store_true", help="measure in this process, print JSON")
    arguments = parser.parse_args()
    if arguments.here:
        for case in cases():
            if arguments.only in f"{case.work} {case.pattern}":
                print(json.dumps(measure(case, arguments.rounds)), flush=True)
        return
    command = ["-m", "experiments.benchmarks.packed", "--here", "--rounds", str(arguments.rounds)]
    by_threads = rows_by_threads([*command, "--only", arguments.only], arguments.threads)
    results: dict[str, Any] = {"instruction_set": nmjax.backends()["ffi"]}
    results |= {f"{threads} threads": rows for threads, rows in by_threads.items()}
    if arguments.threads == [1, 2]:
        results["balance"] = balance(by_threads[1], by_threads[2])
        print_table("Two threads over one", results["balance"])
    # A part must not replace the results of all.
    if not arguments.only:
        print(f"written to {write_results('packed-cpu', results)}")


if __name__ == "__main__":
    main()
