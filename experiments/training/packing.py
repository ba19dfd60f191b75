"""The packed file of a run: the sparse network that it trained, to be served."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

import nmjax
from experiments.distributed.processes import is_first, together
from experiments.training.flags import Flags
from experiments.training.job import Job
from experiments.training.step import TrainState
from nmjax.files.packed_files import save_packed
from nmjax.files.whole_files import check_target


def check_packed(flags: Flags) -> None:
    """Checks that `--packed` can be written, before the run trains for it.

    Raises:
      ValueError: the flags contradict each other, or the folder does not exist.
      OSError: the file exists and is not a regular one, or its folder cannot be written.
      ModuleNotFoundError: safetensors is not installed.
    """
    path = flags.packed
    if path is None:
        return
    if flags.method == "dense":
        raise ValueError("--packed needs a method that trains sparse, got --method dense")
    if len(flags.seeds) > 1:
        raise ValueError(f"--packed writes one network: give one seed, got {flags.seeds}")
    if path.suffix != ".safetensors":
        raise ValueError(f"--packed must be a .safetensors file, got {path}")
    if find_spec("safetensors") is None:
        raise ModuleNotFoundError(
            "--packed needs safetensors; install it with: pip install 'nmjax[files]'"
        )
    if not path.parent.exists():
        if path.parent == flags.folder:  # The run creates it.
            return
        raise ValueError(f"--packed {path}: there is no folder {path.parent}; create it first")
    check_target(path)
    folder = Path(os.path.realpath(path)).parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"--packed {path}: the folder {folder} cannot be written")


def write_packed(path: Path, job: Job, state: TrainState) -> None:
    """Writes the variables of a trained network with its sparse leaves packed.

    The masks are those of training: the method's own, where it remembers masks. Each process must
    call this.

    Raises:
      ValueError: the weights do not have the pattern yet, because the run was too short.
      OSError: the file cannot be written.
    """
    network = state.params, state.collections, state.sparse
    if jax.process_count() > 1:
        network = multihost_utils.process_allgather(network, tiled=True)
    together(partial(_write, path, job, *jax.device_get(network)) if is_first() else lambda: None)


def pack_command(argv: Sequence[str], flags: Flags) -> str:
    """Returns the command that packs a finished run; "" if that is done or cannot be."""
    if flags.packed is not None or flags.method == "dense" or len(flags.seeds) > 1:
        return ""
    given = [word for word in argv if word != "--resume"]
    out = str(flags.folder / "packed.safetensors")
    words = ["python", "-m", "experiments.train", *given, "--resume", "--packed", out]
    return shlex.join(words)


def _write(path: Path, job: Job, params: Any, collections: Any, sparse: Any) -> None:
    plan = job.method.plan
    if plan is None:
        raise TypeError("a dense network has nothing to pack")
    packed = nmjax.pack(job.method.sparsifier.export(params, sparse), plan)
    save_packed(path, {"params": packed, **collections})
    print(f"{nmjax.sizes(packed)}\n{path}: {path.stat().st_size:,} bytes", flush=True)
