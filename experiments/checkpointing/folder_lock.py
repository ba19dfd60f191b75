"""A run's folder belongs to one run at a time."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from pathlib import Path

_NAME = ".lock"

# Seconds between looks at a folder that does not show its owner.
_PAUSES = (0.5, 1, 2, 2)


class FolderLock:
    """Holds a folder until it is released or the process ends, however it ends.

    Attributes:
      owner: the process that holds it, as others read it in the folder.
    """

    def __init__(self, folder: Path) -> None:
        """Takes the folder, making it if needed.

        Raises:
          ValueError: if another run has it; says which process.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # "a+" and not "w": the file tells who has it until we do.
        self._file = (folder / _NAME).open("a+")
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
        self.owner = f"process {os.getpid()} on {platform.node()}"
        self._file.truncate(0)
        self._file.write(self.owner + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # Other hosts see it only then.

    def release(self) -> None:
        """Gives the folder back."""
        self._file.close()


def check_held(folder: Path, owner: str) -> None:
    """Raises ValueError if this process does not see within seconds that `owner` holds the folder.

    A disk of another machine may show for a while what it held before.
    """
    for pause in (0, *_PAUSES):
        time.sleep(pause)
        if _owner(folder / _NAME) == owner:
            return
    raise ValueError(
        f"{folder.absolute()} on {platform.node()} is not the folder that {owner} made: put "
        "--runs-dir on a disk that all processes share"
    )


def _owner(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
