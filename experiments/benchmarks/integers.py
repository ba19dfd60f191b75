"""Packed int8 weights against dense int8 and float32: `python -m experiments.benchmarks.integers`.

One pinned thread, everything interleaved in one process. The baselines are XLA's dense float32
product, our float32 kernel on the same pruned weight, and PyTorch's dense int8 product, which
rounds its inputs in each call like ours, with the faster of its two engines. Errors are those of
the product against float64, relative to its root mean square: of the weight and inputs before
rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nmjax
from experiments.benchmarks.packed import numbers
from experiments.benchmarks.timing import interleaved_times, rows_by_threads, write_results

SHAPES = ((1, 4096), (32, 1024), (256, 4096))  # rows of x, and the side of a square weight
PATTERNS = ("1x16@0.5", "1x16@0.75", "1x16@0.9", "1x16@0.95")
ENGINES = ("x86", "onednn")


def measure(rows: int, size: int, pattern: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of each product, ratios, and errors."""
    x, w = numbers((rows, size)), numbers((size, size)) / size**0.5
    plan = nmjax.make_plan({"w": w}, pattern, axes={"w": (-2,)})
    pruned = nmjax.prune({"w": w}, plan)
    packed = nmjax.pack(pruned, plan)["w"]
    weights = {
        "float32": packed,
        "int8 weights": nmjax.quantize(packed),
        "int8": nmjax.quantize(packed, inputs="dynamic"),
    }
    multiply, dense = jax.jit(nmjax.packed_matmul), jax.jit(jnp.matmul)
    functions: dict[str, Callable[[], Any]] = {
        "dense float32": lambda: dense(x, w),
        **{name: partial(multiply, x, leaf) for name, leaf in weights.items()},
        **torch_functions(np.asarray(x), np.asarray(w)),
    }
    times = interleaved_times(functions, rounds=rounds, at_least=0.02, pause=0.01)
    ms = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    exact = np.asarray(x, np.float64) @ np.asarray(pruned["w"], np.float64)
    errors = {name: error(multiply(x, leaf), exact) for name, leaf in weights.items()}
    int8 = [time for name, time in ms.items() if name.startswith("torch")]
    return {
        "work": f"{rows} x {size} x {size}",
        "pattern": pattern,
        **{f"{name} ms": time for name, time in ms.items()},
        "int8 against dense float32": ms["dense float32"] / ms["int8"],
        "int8 against float32": ms["float32"] / ms["int8"],
        **({"int8 against dense int8": min(int8) / ms["int8"]} if int8 else {}),
        **{f"error of {name}": value for name, value in errors.items()},
    }


def error(y: jax.Array, exact: np.ndarray) -> float:
    """The root mean square error, relative to the root mean square."""
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))


def torch_functions(x: np.ndarray, w: np.ndarray) -> dict[str, Callable[[], Any]]:
    """PyTorch's dense int8 layer for each engine; none if PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(1)
    rows = torch.from_numpy(x.copy())
    functions: dict[str, Callable[[], Any]] = {}
    weight = torch.from_numpy(w.T.copy())
    scales = weight.abs().amax(dim=1).clamp(min=1e-12).double() / 127
    zeros = torch.zeros(len(scales), dtype=torch.long)
    rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    for engine in ENGINES:
        if engine not in torch.backends.quantized.supported_engines:
            continue
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.linear_prepack(rounded, None)

        def multiply(packed: Any = packed) -> Any:
            with torch.inference_mode():
                return torch.ops.quantized.linear_dynamic(rows, packed)

        functions[f"torch int8 {engine}"] = multiply
    return functions


def main() -> None:
    """Prints a table, and writes `results/integers-cpu.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--here", action="store_true", help="print rows in this process")
    arguments = parser.parse_args()
    if arguments.here:
        for rows, size in SHAPES:
            for pattern in PATTERNS:
                print(json.dumps(measure(rows, size, pattern, arguments.rounds)), flush=True)
        return
    command = ["-m", "experiments.benchmarks.integers", "--here", f"--rounds={arguments.rounds}"]
    found = rows_by_threads(command, (1,))
    content = {"kernels": nmjax.backends()["ffi"], "1 thread": found[1]}
    print(write_results("integers-cpu", content))


if __name__ == "__main__":
    main()
