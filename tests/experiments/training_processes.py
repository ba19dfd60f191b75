"""Training runs in processes of their own, as users start them; they read the tiny task."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np

from nmjax.files.checkpoints import read_checkpoint

ROOT = Path(__file__).parents[2]


def start(flags, *, devices=1, compiled=None, **environment):
    """Starts the training command on the tiny task, with so many simulated devices.

    `compiled` is a folder in which processes keep what they compiled, for those that follow.
    """
    count = f"--xla_force_host_platform_device_count={devices}"
    # The tests' other flags, so that programs here and there compute the same.
    environment["XLA_FLAGS"] = re.sub(r"\S+_device_count=\d+", count, os.environ["XLA_FLAGS"])
    # A compilation for speed takes longer than these runs.
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if compiled is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.experiments.train_tiny", *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process, *, status=0, timeout=300):
    """Waits for a process; returns what it printed."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == status, f"{process.returncode}\n{out}\n{err[-3000:]}"
    return out, err


def end_all(processes, *, status=0):
    """Waits for several processes; returns what each printed.

    All pipes are read at once: a process that nobody reads stops when its pipe is full, and the
    others then wait for it.
    """
    with ThreadPoolExecutor(len(processes)) as readers:
        return list(readers.map(partial(end, status=status), processes))


def last_state(folder):
    """The arrays of the newest checkpoint of a run, by name."""
    newest = max(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))
    tree = read_checkpoint(folder / "checkpoints" / str(newest) / "state", "state")
    leaves = jax.tree.leaves_with_path(tree)
    return newest, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
