"""A run's folder belongs to one run at a time."""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path


class FolderLock:
    """Holds a folder until it is released or the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Takes the folder, making it if needed.

        Raises:
          ValueError: if another run has it; says which process.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # "a+" and not "w": the file tells who has it until we do.
        self._file = (folder / ".lock").open("a+")
        try:
            # Of the open file, not of its name: the system takes it back from a dead process.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"{folder} is in use by {owner}: wait for that run to end, or give another --name"
            ) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    def release(self) -> None:
        """Gives the folder back."""
        self._file.close()
