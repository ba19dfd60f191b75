"""Writes files atomically: an interruption leaves the old file or the new one, never a part."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a draft in the same folder, and renames it when it is completely on disk.

    Until then an older file keeps the name. Processes that write the same file at once, even from
    several machines, do not disturb each other: the last one wins. The file's permissions follow
    the umask. A symbolic link stays, and the file that it points to is written.

    Args:
      path: the file to write, in an existing folder.
      write: writes the file at the path that it is given.

    Raises:
      OSError: the file cannot be written, and an older file is unchanged; or `path` is something
        other than a file.
    """
    check_target(path)
    path = Path(os.path.realpath(path))
    # In the same folder, since a rename is atomic only within one file system. The draft's name is
    # short, because the file's own name may be as long as the file system allows.
    draft = path.with_name(f".nmjax-{secrets.token_hex(8)}")
    try:
        draft.touch(mode=0o666, exist_ok=False)  # The system takes the umask off.
        mode = stat.S_IMODE(draft.stat().st_mode)
        write(draft)
        draft.chmod(mode)  # safetensors replaces the draft by a private file.
        _flush(draft)
        draft.replace(path)
        _flush(path.parent)  # Otherwise a crash could undo the renaming.
    finally:
        draft.unlink(missing_ok=True)


def check_target(path: Path) -> None:
    """Checks that a file can be at a path, before any work is done for it.

    Raises:
      FileNotFoundError: its folder does not exist.
      OSError: there is a folder, a device, a pipe or a socket. A renamed file would replace it.
    """
    folder = Path(os.path.realpath(path)).parent
    if path.exists() and not path.is_file():
        raise OSError(f"{path} cannot be written: it exists, and is not a regular file")
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: folder {folder} does not exist")


def _flush(path: Path) -> None:
    """Waits until a file, or the list of files in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
