r"""A decoder pruned after dense training, beside those trained sparse from scratch.

    python -m experiments.train --task python_bytes --method dense --seeds 0 1 2 3 \
      --name bytes_dense
    python -m experiments.benchmarks.pruned_decoder runs/bytes_dense

Each method prunes the network of each seed, calibrated on windows of the training files. The bits
per byte are those of the test files. Networks trained sparse from scratch, for as many steps and
with the same seeds, come from results/python_bytes_careful.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nmjax
from experiments.benchmarks.timing import RESULTS, print_table, write_results
from experiments.json_files import read_json
from experiments.tasks import python_bytes
from experiments.tasks.task import Task
from experiments.training.job import plan_of
from nmjax import post_training
from nmjax.files.checkpoints import read_checkpoint

PATTERNS = ("2:4", "1:4", "1:8")
METHODS = ("magnitude", "wanda", "ria", "sparse_gpt", "admm", "alps")
COMPENSATION = 0.5
FROM_SCRATCH = ("ste", "sr_ste")
# 16 batches of 32 windows of 64 bytes.
CALIBRATION_BATCHES = 16


def read_networks(run: Path) -> list[Any]:
    """The parameters of each seed of a dense run, from its newest checkpoint."""
    newest = max((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    stacked = read_checkpoint(newest)["state"]["train"]["params"]
    seeds = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda x, at=at: jnp.asarray(x[at]), stacked) for at in range(seeds)]


class Bits:
    """Bits per byte of the test files."""

    def __init__(self, task: Task) -> None:
        self._evaluate = jax.jit(task.evaluate)
        self._batches = list(task.eval_batches())

    def __call__(self, params: Any) -> float:
        """The mean over all predicted bytes."""
        sums = [self._evaluate(params, {}, batch) for batch in self._batches]
        name = python_bytes.METRIC.name
        return float(sum(s[name] for s in sums) / sum(s["count"] for s in sums))


def pruned_rows(task: Task, networks: list[Any], pattern: str) -> Iterator[dict[str, Any]]:
    """A row for each method: one pass with statistics of the dense network, or layer by layer."""
    plan, bits, logits = plan_of(task, pattern), Bits(task), task.logits
    assert logits is not None
    batches = [
        jnp.asarray(batch["tokens"])
        for batch in islice(task.train_batches(100, 0), CALIBRATION_BATCHES)
    ]

    def forward(params: Any, tokens: jax.Array) -> Any:
        batch: Any = {"tokens": tokens}
        return logits(params, {}, batch, None)

    yield _row(pattern, "dense", [bits(params) for params in networks])
    ways: dict[str, dict[str, Any]] = {
        **{name: {"method": name, "sequential": False} for name in METHODS},
        **{f"{name}, layer by layer": {"method": name} for name in ("sparse_gpt", "alps")},
        "alps, layer by layer, compensated": {"method": "alps", "compensation": COMPENSATION},
    }
    for name, way in ways.items():
        found, began = [], time.perf_counter()
        for params in networks:
            pruned = post_training.prune_with(forward, params, plan, batches, progress=False, **way)
            nmjax.check_sparse(pruned, plan)
            found.append(bits(pruned))
        yield _row(pattern, name, found, (time.perf_counter() - began) / len(networks))


def from_scratch_rows(pattern: str) -> Iterator[dict[str, Any]]:
    """The rows of the comparison of methods that train sparse."""
    path = RESULTS / "python_bytes_careful.json"
    for trial in read_json(path)["trials"]:
        if trial["pattern"] == pattern and trial["method"] in ("dense", *FROM_SCRATCH):
            last = trial["epochs"][-1]["test"][python_bytes.METRIC.name]
            yield _row(pattern, f"from scratch: {trial['method']}", last)


def _row(pattern: str, method: str, bits: list[float], seconds: float = 0.0) -> dict[str, Any]:
    mean, deviation = float(np.mean(bits)), float(np.std(bits, ddof=1))
    known = {"pattern": pattern, "method": method, "bits per byte": mean, "deviation": deviation}
    return {**known, "seconds a network": seconds, "seeds": [round(x, 4) for x in bits]}


def main() -> None:
    """Prints a table for each pattern, and writes all of them to results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a dense run of python_bytes")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    arguments = parser.parse_args()
    task, networks, tables = python_bytes.task(), read_networks(arguments.run), {}
    for pattern in arguments.patterns:
        tables[pattern] = list(from_scratch_rows(pattern))
        for row in pruned_rows(task, networks, pattern):
            print(row, flush=True)
            tables[pattern].append(row)
    for pattern, rows in tables.items():
        print_table(pattern, rows)
    print(f"written to {write_results('pruned_decoder', tables)}")


if __name__ == "__main__":
    main()
