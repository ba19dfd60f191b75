"""Reads parts of a checkpoint, and separates damage from what this machine lacks."""

from __future__ import annotations

import errno
import json
import math
import re
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

# What a machine may lack for reading; MemoryError and PermissionError have classes.
_LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
# Tensorstore raises ValueErrors, whose text has the number, such as "[os_error_code='24']".
_TOLD = {*_LACKING, errno.EACCES, errno.EPERM}
# What reading a score raises if its file, or the folder around it, is damaged.
_NO_SCORE = (
    *(ValueError, KeyError, TypeError, OverflowError, RecursionError),
    *(IsADirectoryError, NotADirectoryError),
)
_TOLD_BY_TENSORSTORE = re.compile(rf"os_error_code='({'|'.join(map(str, sorted(_TOLD)))})'")


class DamagedError(Exception):
    """A checkpoint that cannot be read, or does not hold what was written."""


class UnreadableError(OSError):
    """A checkpoint that cannot be read here and now, though it may be whole."""


def read_alone(path: Path, handler: Callable[[], ocp.CheckpointHandler], args: Any) -> Any:
    """Reads a folder of a checkpoint in this process alone, without waiting for the others."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    try:
        for file in path.rglob("*"):
            # Errors of Python have a class and a number; tensorstore raises only ValueErrors.
            next(file.iterdir(), None) if file.is_dir() else file.open("rb").close()
        with ocp.Checkpointer(handler(), multiprocessing_options=alone) as reader:
            return reader.restore(path, args=args)
    except Exception as error:  # Orbax and tensorstore raise many kinds.
        _silence_unfinished_reads()
        if not _is_lack(error):
            raise DamagedError(first_line(error)) from error
        raise UnreadableError(
            f"the checkpoint {path.parent} cannot be read here: {first_line(error)}. It may be "
            "intact, so nothing was changed; fix the cause, then continue with --resume"
        ) from error


@cache
def _silence_unfinished_reads() -> None:
    """Keeps Python from printing a page for each array that was being read when another failed.

    Orbax does not wait for these reads. They fail later, when Python collects their coroutines.
    """
    printing = sys.unraisablehook

    def without_reads(unraisable: sys.UnraisableHookArgs) -> None:
        if "_read_array" not in getattr(unraisable.object, "__qualname__", ""):
            printing(unraisable)

    sys.unraisablehook = without_reads


def _is_lack(error: BaseException) -> bool:
    """Whether an error, or one behind it, says that the machine lacks something."""
    # JAX only sees numbers that have been read, so its errors are never about the file.
    if isinstance(error, MemoryError | PermissionError | jax.errors.JaxRuntimeError):
        return True
    if getattr(error, "errno", None) in _LACKING or _TOLD_BY_TENSORSTORE.search(str(error)):
        return True
    behind = error.__cause__ or error.__context__
    return behind is not None and _is_lack(behind)


def read_score(path: Path) -> float:
    """Reads the score that orbax wrote for a checkpoint; -inf if it wrote none.

    Raises:
      DamagedError: there is no number that can be a score. A checkpoint without test metrics has
        the score -inf.
    """
    try:
        score = json.loads(path.read_bytes())["score"]
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise TypeError(f"the score is {score!r}, not a number")
        if not score < math.inf:
            raise ValueError(f"the score is {score}")
        return float(score)
    except FileNotFoundError:
        return -math.inf
    except _NO_SCORE as error:
        raise DamagedError(f"{type(error).__name__}: {first_line(error)}") from error


def signed(about: dict[str, Any]) -> dict[str, Any]:
    """Adds a checksum to what describes a checkpoint: flipped bits may still be valid JSON."""
    return {**about, "checksum": _checksum(about)}


def unsigned(about: Any) -> dict[str, Any]:
    """Removes the checksum; raises DamagedError if it does not fit."""
    if not isinstance(about, dict):
        raise DamagedError(f"about is a {type(about).__name__}, not an object")
    rest = {name: value for name, value in about.items() if name != "checksum"}
    # Checkpoints of earlier versions have none.
    if "checksum" in about and about["checksum"] != _checksum(rest):
        raise DamagedError("about is not what was written")
    return rest


def _checksum(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def unused(path: Path) -> Path:
    """Returns the path, or a longer one that does not exist yet."""
    while path.exists():
        path = path.with_name(f"{path.name}-again")
    return path


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or its class."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
