"""Reads `.npz` files of plain arrays: the headers first, arrays only when they are asked for."""

from __future__ import annotations

import errno
import math
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from nmjax.files.file_kinds import check_file
from nmjax.layouts.axes import Shape
from nmjax.tables import printable

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class StoredArray:
    """What the header of a member says about its array."""

    shape: Shape
    dtype: np.dtype


@dataclass(frozen=True)
class NpzFile:
    """An `.npz` file, of which only the headers have been read.

    Attributes:
      path: the file.
      arrays: name -> what its header says.
    """

    path: Path
    arrays: dict[str, StoredArray]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Reads arrays one after the other.

        Raises:
          ValueError: an array is damaged.
        """
        with _named_errors(self.path), zipfile.ZipFile(self.path) as archive:
            for name in names:
                with archive.open(f"{name}.npy") as member:
                    yield name, np.lib.format.read_array(member, allow_pickle=False)


def open_npz(path: Path) -> NpzFile:
    """Reads the headers of an `.npz` file.

    Raises:
      ValueError: it is not a regular file, or not an archive of plain arrays with distinct names.
    """
    check_file(path)
    arrays: dict[str, StoredArray] = {}
    with _named_errors(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename:
                raise ValueError(f"{name!r} is not an array (.npy)")
            if name in arrays:
                raise ValueError(f"two arrays are named {name!r}")
            with archive.open(info) as member:
                arrays[name] = _read_header(name, member, info.file_size)
    return NpzFile(path, arrays)


def _read_header(name: str, member: IO[bytes], size: int) -> StoredArray:
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
        raise ValueError(f"{name!r} has structured numbers")
    shape, _, dtype = _HEADERS[version](member)
    if dtype.hasobject:
        raise ValueError(f"{name!r} holds Python objects, which would need pickle")
    if dtype.kind == "V":  # What NumPy writes for dtypes that are not its own.
        raise ValueError(
            f"the dtype of {printable(name)} was lost. .npz files cannot store bfloat16; use "
            "safetensors instead"
        )
    # A forged header could ask for any memory.
    if math.prod(shape) * dtype.itemsize != size - member.tell():
        raise ValueError(f"{name!r} has another size than its header says")
    return StoredArray(tuple(shape), dtype)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turns the many errors of the zip and array readers into one."""
    try:
        yield
    except Exception as error:
        # A file that cannot be read is not a file of another format. A forged position in the
        # archive is an invalid argument.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path} is not an .npz file of plain arrays: {error}") from error
