"""The folder of a run: one run at a time uses it, and resumes only what it holds."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal

from experiments.distributed.processes import is_first, tell_all, together
from experiments.json_files import Numbers, differences, write_json

# What to do with an earlier run in the folder: go on with it, refuse to touch it, or start over.
Earlier = Literal["resume", "refuse", "replace"]

_LOCK, _SETTINGS = ".lock", "settings.json"


def open_folder(
    path: Path,
    settings: Numbers,
    *,
    earlier: Earlier,
    deciding: Callable[[Numbers], Numbers] = dict,
    texts: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[], None]:
    """Takes a folder for a run and writes the settings there. Every process must call this.

    Args:
      path: a folder that all processes share.
      settings: nested dicts.
      earlier: what to do with a run that is there.
      deciding: settings -> those in which a resumed run must agree.
      texts: file name -> what else to write there, for readers.

    Returns:
      A function that gives the folder back, as the end of the process does.

    Raises:
      ValueError: the folder is in use, holds another run, or is not the same in all processes.
    """
    # Through JSON, so that tuples and paths compare as they are read back.
    settings = json.loads(json.dumps(settings, default=str))

    def keep() -> None:
        if is_first():
            _check_earlier(path, settings, earlier, deciding)
            write_json(path / _SETTINGS, settings, indent=2)
            for name, text in texts.items():
                (path / name).write_text(f"{text}\n", "utf-8")

    lock = together(lambda: take(path) if is_first() else None)
    release = (lambda: None) if lock is None else lock.close
    try:
        together(keep)
        owner = tell_all(_this_process())[0]
        together(partial(check_shared, path, owner))
    except BaseException:
        release()
        raise
    return release


def take(path: Path) -> IO[str]:
    """Locks a folder, creating it if needed; returns the open lock file, which owns it.

    Raises a ValueError that names the owner if another run has the folder.
    """
    path.mkdir(parents=True, exist_ok=True)
    # "a+" and not "w": the file must keep the owner's name until we have the lock.
    lock = (path / _LOCK).open("a+", encoding="utf-8")
    try:
        # The lock belongs to the open file, so the system takes it back from a dead process.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        owner = _owner(path) or "another process"
        raise ValueError(
            f"{path} is in use by {owner}: wait for that run to end, or give another --name"
        ) from error
    lock.truncate(0)
    print(_this_process(), file=lock, flush=True)
    os.fsync(lock.fileno())  # Only then do other hosts see it.
    return lock


def check_shared(path: Path, owner: str) -> None:
    """Raises ValueError if this process does not see within seconds that `owner` has the folder."""
    for seconds in (0, 0.5, 1, 2, 2):  # A network disk may show old content for a while.
        time.sleep(seconds)
        if (path / _LOCK).exists() and (path / _LOCK).read_text(
            "utf-8", "replace"
        ).strip() == owner:
            return
    raise ValueError(
        f"{path.absolute()} on {platform.node()} is not the folder that {owner} created: put "
        "--runs-dir on a disk that all processes share"
    )


def _check_earlier(
    folder: Path, settings: Numbers, earlier: Earlier, deciding: Callable[[Numbers], Numbers]
) -> None:
    path = folder / _SETTINGS
    if earlier == "replace" or not path.exists():
        return
    if earlier == "refuse":
        raise ValueError(
            f"{folder} already holds a run: give --resume to continue it, or another --name"
        )
    try:
        stored = json.loads(path.read_text("utf-8"))
        before = deciding(stored)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold the settings of a run: {error!r}. If you have no copy, delete "
            "the file, and --resume continues with the flags given now"
        ) from error
    now = deciding(settings)
    # Other settings, such as the length of the warm-up, follow from the flags.
    given = _changed_flags(settings, stored)
    changed = differences(_only(given, now), _only(given, before)) or differences(now, before)
    if changed:
        raise ValueError(
            f"the run in {folder} cannot be resumed with other settings: {changed}. Give the "
            "flags it was started with, or another --name"
        )


def _changed_flags(now: Numbers, before: Numbers) -> set[str]:
    both = (now.get("flags"), before.get("flags"))
    # The file may hold anything, and not all settings have flags.
    new, old = (flags if isinstance(flags, Mapping) else {} for flags in both)
    return {name for name in new.keys() | old.keys() if new.get(name) != old.get(name)}


def _only(names: set[str], settings: Numbers) -> Numbers:
    return {name: value for name, value in settings.items() if name in names}


def _owner(path: Path) -> str:
    return (path / _LOCK).read_text("utf-8", "replace").strip()


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"
