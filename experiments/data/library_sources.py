"""The sources of Python's own library as bytes: text that is present wherever Python is."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# Packages installed by somebody, tests, and generated tables come and go with the installation.
_LEFT_OUT = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip"]
)

# Of 256 values of a hash, how many put a file into the test set: about a tenth. Another byte of
# the hash holds as many of the other files out for validation.
_TEST_HASHES = 26


class Sources(NamedTuple):
    """All files, split in two.

    Attributes:
      train: the training files' bytes, a zero byte after each.
      test: the same of the test files.
      train_files: how many.
      test_files: how many.
      skipped: files that could not be read, relative to the folder.
    """

    train: Bytes
    test: Bytes
    train_files: int
    test_files: int
    skipped: tuple[str, ...]


def load_sources(folder: Path | None = None, *, validation: bool = False) -> Sources:
    """Reads every `*.py` file of a folder and splits them by a hash of the relative path.

    A file's half depends only on its path within the library.

    Args:
      folder: of the library; None for that of the running Python.
      validation: whether a tenth of the training files takes the place of the test files, which
        are left out.

    Raises:
      ValueError: if one of the halves is empty.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    halves: dict[bool, list[bytes]] = {False: [], True: []}
    skipped = []
    for path in library_files(root):
        name = path.relative_to(root).as_posix()
        if validation and is_test(name):
            continue
        try:
            halves[is_held_out(name) if validation else is_test(name)].append(path.read_bytes())
        except OSError:
            skipped.append(name)
    train, test = halves[False], halves[True]
    if not train or not test:
        raise ValueError(
            f"{root} has {len(train)} training and {len(test)} test files named *.py, "
            f"{len(skipped)} could not be read. At least one of each is needed. Is the library "
            "installed there as sources?"
        )
    return Sources(_join(train), _join(test), len(train), len(test), tuple(skipped))


def is_test(name: str) -> bool:
    """Whether a file, named by its path with slashes, is a test file."""
    return _hash(name)[0] < _TEST_HASHES


def is_held_out(name: str) -> bool:
    """Whether a file, if it is a training file, is held out for validation."""
    return _hash(name)[1] < _TEST_HASHES


def _hash(name: str) -> bytes:
    # Not `hash`, which gives a string another number in every process.
    return hashlib.sha256(name.encode()).digest()


def library_files(root: Path) -> Iterator[Path]:
    """The Python files of a library folder, in the same order everywhere."""
    # Sorted, because the order of a folder's entries depends on the file system.
    for path in sorted(root.rglob("*.py")):
        if not _LEFT_OUT & set(path.relative_to(root).parts[:-1]):
            yield path


def _join(files: list[bytes]) -> Bytes:
    return np.frombuffer(b"".join(content + b"\0" for content in files), np.uint8)
