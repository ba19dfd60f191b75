"""Files that are there whole or not at all, whatever interrupts their writing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside its place, and moves it there when all of it is on disk.

    Until then an older file of that name stays. Processes that write one file at once, also on
    several machines, do not meet: the last wins.

    Args:
      path: of the file, in a folder that is there.
      write: makes the file whose path it is given.

    Raises:
      OSError: the file cannot be written; an older one is as it was.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write(draft)
        _flush(draft)
        draft.replace(path)
        _flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Returns when a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
