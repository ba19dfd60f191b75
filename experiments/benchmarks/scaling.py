"""Sparse training on more and more devices: step time, collectives, checkpoints.

    python -m experiments.benchmarks.scaling

One processor's cores simulate the devices, so more devices do not make a step faster. What counts
is that the ratio of the sparse step to the dense step stays the same. Every device has the same
number of examples, as on a pod. (If more and more simulated devices shared one batch, the ratio
would grow under data parallelism for a reason that real devices do not have: every device computes
all masks, and here one processor does so for all of them in turn.)

The checkpoints are those of the training loop. For every method, dense included, they hold the
masks of the initial weights and of the last epoch at one bit a weight each. They are compared with
the dense parameters and optimizer state.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from experiments.benchmarks.large_model import COLLECTIVES
from experiments.benchmarks.timing import interleaved_medians, print_table, write_results
from experiments.checkpointing.checkpoints import Checkpoints
from experiments.distributed.layout import Preset
from experiments.distributed.placement import Placement, make_placement
from experiments.tasks.families.classification import classification_task
from experiments.tasks.task import Batch, Recipe, Task
from experiments.training.job import Job, assemble_job
from experiments.training.loop import begin
from experiments.training.step import Programs, RunState, make_programs

CLASSES = 16


class Perceptron(nn.Module):
    """Dense layers of equal width, and a head."""

    width: int
    layers: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(batch, width, 1, 1) -> (batch, classes)."""
        del train
        x = x.reshape(len(x), -1)
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(CLASSES, name="head")(x)


def make_task(width: int, batch_size: int) -> Task:
    """A task with one batch of noise; only its times matter."""
    rng = np.random.default_rng(0)
    batch: Batch = {
        "image": rng.standard_normal((batch_size, width, 1, 1), np.float32),
        "label": rng.integers(0, CLASSES, batch_size).astype(np.int32),
    }
    return classification_task(
        name="noise",
        model=Perceptron(width),
        # Classification takes images, so the features are pixels of one column.
        input_shape=(width, 1, 1),
        train_batches=lambda seed, epoch: iter([batch]),
        eval_batches=lambda: iter([{**batch, "valid": np.ones(batch_size, np.float32)}]),
        steps_per_epoch=1,
        recipe=Recipe(epochs=10, batch_size=batch_size),
        keep_dense=("head",),
    )


def place(job: Job, devices: int, preset: Preset) -> tuple[Placement, Programs, RunState, Any]:
    """Placement, programs, first state and batch of a job on a number of devices."""
    placement = make_placement(
        jax.eval_shape(job.task.init, jax.random.key(0))["params"],
        job.plan,
        batch_size=job.task.recipe.batch_size,
        mesh=f"data={devices}",
        preset=preset,
    )
    programs = make_programs(job, layout=placement.layout)
    with placement.active():
        state = begin(programs, (0,), job.task.recipe.lambda_w)
    (batch,) = job.task.train_batches(0, 0)
    return placement, programs, state, placement.put(batch)


def measure_steps(
    width: int,
    examples: int,
    *,
    pattern: str,
    counts: tuple[int, ...],
    preset: Preset,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """One row for each number of devices: SR-STE against dense, `examples` a device."""
    for devices in counts:
        task = make_task(width, examples * devices)
        calls: dict[str, Callable[[], Any]] = {}
        collectives = {}
        for method in ("dense", "sr_ste"):
            placement, programs, state, batch = place(
                assemble_job(task, method, pattern), devices, preset
            )
            with placement.active():
                compiled = programs.step.lower(state.train, batch).compile()  # type: ignore[attr-defined]
            collectives[method] = Counter(re.findall(COLLECTIVES, compiled.as_text()))
            calls[method] = _one_further(compiled, state.train, batch)
        seconds = interleaved_medians(calls, rounds=rounds)
        yield {
            "devices": devices,
            "layout": preset,
            "seconds": seconds["sr_ste"],
            "dense_seconds": seconds["dense"],
            "ratio": seconds["sr_ste"] / seconds["dense"],
            "collectives": collectives["sr_ste"].total(),
            "dense collectives": collectives["dense"].total(),
        }


def measure_checkpoints(
    task: Task, *, pattern: str, devices: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """One row for what is saved: bytes on disk, and seconds to save and to restore."""
    baseline = 0
    for name, method in (
        ("dense, no masks", "dense"),
        ("dense", "dense"),
        ("SR-STE", "sr_ste"),
        ("one-shot", "one_shot"),
    ):
        placement, programs, state, batch = place(
            assemble_job(task, method, pattern), devices, "fsdp"
        )
        with placement.active():
            train = state.train
            # Past the step at which a one-shot mask is taken; zeros would take no room on disk.
            for _ in range(task.recipe.epochs):
                train = programs.step(programs.refresh(train), batch)
        state = state._replace(train=train)
        saved = train if name == "dense, no masks" else state
        row = _save_and_restore(saved, placement, rounds)
        # The first row is what the others are compared with.
        baseline = baseline or row["bytes"]
        yield {"saved": name, **row, "of dense": row["bytes"] / baseline}


def _save_and_restore(state: Any, placement: Placement, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"blocked": [], "written": [], "restored": []}
    size = 0
    like = jax.eval_shape(lambda: state)
    for _ in range(rounds + 1):
        folder = Path(tempfile.mkdtemp())
        store = Checkpoints(folder, placement=placement)
        with placement.active():
            began = time.perf_counter()
            store.save(0, state)
            seconds["blocked"].append(time.perf_counter() - began)
            store.wait()
            seconds["written"].append(time.perf_counter() - began)
            began = time.perf_counter()
            jax.block_until_ready(store.restore(like))
            seconds["restored"].append(time.perf_counter() - began)
        store.close()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder)
    # The first round compiles.
    medians = {f"{name} seconds": statistics.median(times[1:]) for name, times in seconds.items()}
    return {"bytes": size, **medians}


def _one_further(compiled: Any, state: Any, batch: Any) -> Callable[[], Any]:
    """A function that takes one more step at each call."""

    def call() -> Any:
        nonlocal state
        state = compiled(state, batch)
        return state

    return call


def main() -> None:
    """Prints both tables and writes them to results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--examples", type=int, default=1024, help="of each device, in a step")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each")
    flags = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(flags.devices))
    presets: tuple[Preset, ...] = ("data", "fsdp")
    steps = [
        row
        for preset in presets
        for row in measure_steps(
            flags.width,
            flags.examples,
            pattern=flags.pattern,
            counts=tuple(flags.devices),
            preset=preset,
            rounds=flags.rounds,
        )
    ]
    print_table("SR-STE step against the dense step", steps)
    checkpoints = list(
        measure_checkpoints(
            make_task(flags.width, flags.examples),
            pattern=flags.pattern,
            devices=max(flags.devices),
            rounds=5,
        )
    )
    print_table("Checkpoints", checkpoints)
    write_results("scaling-cpu", {"flags": vars(flags), "steps": steps, "checkpoints": checkpoints})


if __name__ == "__main__":
    main()
