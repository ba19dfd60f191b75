"""The settings of a run: what is written down, and what decides the result."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from experiments.distributed.processes import tell_all
from experiments.json_files import Numbers, differences, machine
from experiments.training.flags import Flags
from experiments.training.step import Job

# Flags that each of several processes may have for itself.
_OWN = {"distributed", "coordinator", "processes", "process"}
_OWN |= {"data_dir", "workers", "threads", "runs_dir"}
# Flags that change how fast a run goes and what it leaves, but not the result, except rounding.
_FREE = {*_OWN, "devices", "mesh", "axis_types", "layout", "shard", "batch_axes", "remat"}
_FREE |= {"name", "resume", "checkpoint_every", "checkpoint_steps", "keep_checkpoints"}
_FREE |= {"keep_best", "evaluate_every", "log_every", "packed"}


def settings_of(flags: Flags, job: Job) -> Numbers:
    """Returns all settings of a run, and the machine."""
    return {
        "flags": {**dataclasses.asdict(flags), "model": flags.model_name},
        "recipe": dataclasses.asdict(job.task.recipe),
        "keep_dense": job.task.keep_dense,
        "identity": dict(job.task.identity),
        "machine": machine(),
    }


def deciding(settings: Numbers) -> Numbers:
    """Returns the settings in which a resumed run must agree."""
    fixed = {name: value for name, value in settings["flags"].items() if name not in _FREE}
    # The recipe holds what flags changed in it; whether a flag or the task said so is the same.
    chosen = {**fixed, **settings["recipe"]}
    return {**chosen, "keep_dense": settings["keep_dense"], **settings["identity"]}


def check_alike(settings: Numbers, steps_per_epoch: int) -> None:
    """Raises ValueError in every process if one has other flags or data; each must call this.

    They would wait for each other at different steps.
    """
    shared = {name: value for name, value in settings["flags"].items() if name not in _OWN}
    own: dict[str, Any] = {**shared, **deciding(settings), "steps_per_epoch": steps_per_epoch}
    first, *others = map(json.loads, tell_all(json.dumps(own, default=str)))
    for process, other in enumerate(others, start=1):
        if different := differences(other, first):
            raise ValueError(
                f"process {process} has other settings than process 0: {different}. Give all the "
                "same flags and data, and the same versions of Python and of the packages"
            )
