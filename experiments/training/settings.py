"""The settings of a run in its folder, so that it can be repeated, and only resumed as it was."""

from __future__ import annotations

import dataclasses
import json
import platform
from itertools import zip_longest
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax

from experiments.distributed.placement import Placement
from experiments.distributed.processes import tell_all
from experiments.tasks.task import Task
from experiments.training.flags import Flags
from experiments.training.step import Job
from nmjax.files.whole_files import write_whole

# Flags that change how fast a run goes and what it leaves behind, but, rounding aside, not what
# comes out.
_FREE_FLAGS = frozenset(
    [
        "devices",
        "mesh",
        "axis_types",
        "layout",
        "shard",
        "batch_axes",
        "distributed",
        "coordinator",
        "processes",
        "process",
        "remat",
        "data_dir",
        "workers",
        "threads",
        "runs_dir",
        "name",
        "resume",
        "checkpoint_every",
        "checkpoint_steps",
        "keep_checkpoints",
        "keep_best",
        "evaluate_every",
        "log_every",
    ]
)

# Parts of settings.json that decide what comes out.
_DECIDING = frozenset(["flags", "recipe", "keep_dense", "identity"])

# Flags that each of several processes has for itself.
_OWN_FLAGS = frozenset(
    [
        "distributed",
        "coordinator",
        "processes",
        "process",
        "data_dir",
        "workers",
        "threads",
        "runs_dir",
    ]
)


def check_alike(flags: Flags) -> None:
    """Compares the flags of all processes, each of which must call this.

    Raises:
      ValueError: if one was started with other flags, in every process.
    """
    own = {k: v for k, v in dataclasses.asdict(flags).items() if k not in _OWN_FLAGS}
    if found := _first_other(own):
        process, differ = found
        raise ValueError(
            f"process {process} was started with other flags than process 0: {differ}. Give all "
            "the same"
        )


def check_same_task(task: Task) -> None:
    """Compares what all processes made of the flags, as each may have data of its own.

    Raises:
      ValueError: if the data or the recipe of one differ, in every process. They would wait for
        each other at different steps.
    """
    own = {
        "steps_per_epoch": task.steps_per_epoch,
        **dataclasses.asdict(task.recipe),
        **dict(task.identity),
    }
    if found := _first_other(own):
        process, differ = found
        raise ValueError(
            f"process {process} has another task {task.name} than process 0: {differ}. Give all "
            "the same data, and the same versions of Python and of the packages"
        )


def _first_other(own: dict[str, Any]) -> tuple[int, str] | None:
    """The first process that has other entries than process 0, and which; None if all agree."""
    said = tell_all("\n".join(f"{name} {value}" for name, value in own.items()))
    first, *others = (text.splitlines() for text in said)
    for process, lines in enumerate(others, start=1):
        pairs = zip_longest(lines, first, fillvalue="nothing")
        if differ := [f"{one}, not {other}" for one, other in pairs if one != other]:
            return process, "; ".join(differ)
    return None


def claim_folder(flags: Flags, job: Job, placement: Placement) -> None:
    """Makes the run's folder, with settings, plan and layout, or finds what an earlier run left.

    Raises:
      ValueError: if another run is there; with `resume`, if that differs in what decides the
        result, or its settings cannot be read.
    """
    path = flags.folder / "settings.json"
    settings = {
        "flags": {**dataclasses.asdict(flags), "model": flags.model_name},
        "recipe": dataclasses.asdict(job.task.recipe),
        "keep_dense": job.task.keep_dense,
        "identity": dict(job.task.identity),
        "machine": _machine(),
    }
    # Through JSON, so that tuples and paths compare as what is read back.
    settings = json.loads(json.dumps(settings, default=str))
    if path.exists():
        if not flags.resume:
            raise ValueError(
                f"{flags.folder} holds a run already: give --resume to go on, or another --name"
            )
        _check_same(_read(path), settings, flags.folder)
    flags.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2) + "\n"
    write_whole(path, lambda part: part.write_text(text))
    (flags.folder / "plan.txt").write_text(f"{job.plan}\n")
    (flags.folder / "layout.txt").write_text(f"{placement.layout or 'one device'}\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text())
        if not isinstance(stored, dict) or not stored.keys() >= _DECIDING:
            raise ValueError(f"expected an object with {', '.join(sorted(_DECIDING))}")
    except ValueError as error:
        raise ValueError(
            f"{path} does not hold the settings of a run: {error}. If nobody has them, delete the "
            "file, and --resume goes on with the flags given now"
        ) from error
    return stored


def _check_same(stored: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    def deciding(of: dict[str, Any]) -> dict[str, Any]:
        fixed = {name: value for name, value in of["flags"].items() if name not in _FREE_FLAGS}
        # What the recipe says holds; whether a flag or the task said it does not matter.
        return {**fixed, **of["recipe"], "keep_dense": of["keep_dense"], **of["identity"]}

    before, now = deciding(stored), deciding(settings)
    changed = [
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"the run in {folder} cannot be resumed with other settings: {'; '.join(changed)}"
        )


def _machine() -> dict[str, Any]:
    versions = {module.__name__: module.__version__ for module in (jax, flax, optax, np)}
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": f"{jax.device_count()} x {device.platform} {device.device_kind}",
        **versions,
    }
