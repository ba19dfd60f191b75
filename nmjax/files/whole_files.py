"""Writes files atomically: an interruption leaves the old file or the new one, never a part."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a draft in the same folder, and renames it when it is completely on disk.

    Until then an older file keeps the name. Processes that write the same file at once, even from
    several machines, do not disturb each other: the last one wins.

    Args:
      path: the file to write, in an existing folder.
      write: writes the file at the path that it is given.

    Raises:
      OSError: the file cannot be written; an older file is unchanged.
    """
    # In the same folder, since a rename is atomic only within one file system.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write(draft)
        _flush(draft)
        draft.replace(path)
        _flush(path.parent)  # Otherwise a crash could undo the renaming.
    finally:
        draft.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Waits until a file, or the list of files in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
