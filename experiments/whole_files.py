"""Files that are there whole or not at all, whatever interrupts their writing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside its place and moves it there; the one before stays until then.

    Processes that write one file at once, also on several machines, do not meet: the last wins.

    Args:
      path: of the file, in a folder that is there.
      write: makes the file whose path it is given.

    Raises:
      OSError: if the file cannot be written; the one before is as it was.
    """
    # In a folder of its own: its name is nobody else's, and the file is as readable as any.
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
        part = Path(folder) / path.name
        write(part)
        part.replace(path)
