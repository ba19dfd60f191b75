"""Writes named arrays to safetensors files, and reads files that may be damaged or forged.

The format is a JSON header and raw bytes, so nothing in a file is ever executed. The header is read
first, by the safetensors library, and arrays only when they are asked for. All dtypes of whole
bytes that JAX and safetensors share are supported.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from nmjax.files.file_kinds import check_file, foreign_kind
from nmjax.files.whole_files import check_target, write_whole
from nmjax.layouts.axes import Shape
from nmjax.tables import printable

# The header's key under which nmjax describes the contents of a file, as JSON.
NOTE = "nmjax"
# Bytes that are copied at once.
_PART = 2**22

_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "I8": np.int8,
        "U8": np.uint8,
        "I16": np.int16,
        "U16": np.uint16,
        "I32": np.int32,
        "U32": np.uint32,
        "I64": np.int64,
        "U64": np.uint64,
        "F16": np.float16,
        "BF16": jnp.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": jnp.float8_e4m3fn,
        "F8_E5M2": jnp.float8_e5m2,
        "F8_E8M0": jnp.float8_e8m0fnu,
        "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
        "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    }.items()
}


class StoredTensor(NamedTuple):
    """What the header of a file says about a tensor.

    Attributes:
      shape: sizes of its axes.
      code: the format's name of its dtype, such as "F32".
      begin: the position of its first byte in the file.
      nbytes: its number of bytes.
    """

    shape: Shape
    code: str
    begin: int
    nbytes: int

    @classmethod
    def of(cls, name: str, array: Any) -> StoredTensor:
        """The entry of an array that is not in a file yet, or of anything with its shape and dtype.

        Raises:
          TypeError: the format does not support the dtype.
        """
        dtype = np.dtype(array.dtype)
        code = next((code for code, known in _DTYPES.items() if known == dtype), None)
        if code is None:
            raise TypeError(f"{name} has dtype {dtype}, which safetensors does not support")
        return cls(tuple(array.shape), code, 0, math.prod(array.shape) * dtype.itemsize)

    @property
    def dtype(self) -> np.dtype | None:
        """Its dtype; None if NumPy and JAX have no such dtype of whole bytes."""
        return _DTYPES.get(self.code)


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file; `read` reads its tensors.

    Attributes:
      path: the file.
      tensors: name -> what the header says, in the order of the names.
      metadata: the text of the header.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the file on disk."""
        return self.path.stat().st_size

    def read_bytes(self, name: str) -> Iterator[np.ndarray]:
        """Reads the bytes of a tensor of any dtype in parts, each of which is used before the next.

        Raises:
          ValueError: the file has become shorter.
        """
        tensor = self.tensors[name]
        part = np.empty(min(tensor.nbytes, _PART), np.uint8)
        with self.path.open("rb") as file:
            for begin in range(0, tensor.nbytes, _PART):
                data = part[: tensor.nbytes - begin]
                if not _fill(data, file, tensor.begin + begin):
                    raise ValueError(
                        f"{self.path} cannot be read: {printable(name)[:80]}: the file has become "
                        "shorter"
                    )
                yield data

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Reads tensors one after the other.

        Raises:
          ValueError: NumPy lacks the dtype, or the file has changed or holds impossible numbers.
        """
        with self.path.open("rb") as file:
            for name in names:
                tensor = self.tensors[name]
                data = np.empty(tensor.nbytes, np.uint8)
                try:
                    # A file may have far more empty tensors than bytes of data.
                    if tensor.nbytes and not _fill(data, file, tensor.begin):
                        raise ValueError("the file has become shorter")
                    array = _array(tensor, data)
                    del data
                    yield name, array
                    # Or it would be in memory together with the next one.
                    del array
                except ValueError as error:
                    raise ValueError(
                        f"{self.path} cannot be read: {printable(name)[:80]}: {error}"
                    ) from error


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Writes arrays and text to a safetensors file.

    An existing file is replaced only after the new one is completely on disk. Its permissions
    follow the umask.

    Args:
      path: the file to write.
      tensors: name -> JAX or NumPy array.
      metadata: text for the header.

    Raises:
      TypeError: the format does not support an array's dtype.
      OSError: the file cannot be written.
      ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    from safetensors.numpy import save_file

    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in _DTYPES.values():
            raise TypeError(f"{name} has dtype {array.dtype}, which safetensors does not support")
    path = Path(path)
    check_target(path)
    try:
        write_whole(path, lambda draft: save_file(arrays, draft, metadata=dict(metadata)))
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Reads the header of a safetensors file.

    Raises:
      ValueError: it is not a regular file, or not a safetensors file.
      ImportError: safetensors is not installed.
    """
    safetensors, path = _safetensors(), Path(path)
    check_file(path)
    try:
        # Checks all that the header says. The library's lazy reader does not give positions, and
        # lacks dtypes, so the header is then parsed here.
        with safetensors.safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=_without_repeats)
    except (safetensors.SafetensorError, ValueError) as error:
        kind = foreign_kind(path)
        raise ValueError(f"{path} is not a safetensors file{kind or f': {error}'}") from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {name: _stored(entry, 8 + size) for name, entry in sorted(header.items())}
    return TensorFile(path, tensors, metadata)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file.

    Returns:
      Name -> NumPy array, and the text of the header.

    Raises:
      ValueError: it is not a safetensors file, or NumPy does not support one of its dtypes.
      ImportError: safetensors is not installed.
    """
    file = open_tensors(path)
    return dict(file.read(file.tensors)), file.metadata


def read_note(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Parses nmjax's description in a file's header; returns an empty dict if there is none.

    Raises:
      ValueError: the text is not a JSON object, or has a key twice.
    """
    try:
        note = json.loads(metadata.get(NOTE, "{}"), object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("the header is nested too deeply") from error
    if not isinstance(note, dict):
        raise ValueError(f"the header is a {type(note).__name__}, not a dict")
    return note


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("the header has a key twice")
    return values


def _stored(entry: Mapping[str, Any], data: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    return StoredTensor(tuple(entry["shape"]), entry["dtype"], data + begin, end - begin)


def _fill(data: np.ndarray, file: BinaryIO, begin: int) -> bool:
    """Reads bytes of a file; returns whether it has as many."""
    file.seek(begin)
    return file.readinto(data.data) == len(data)  # type: ignore[attr-defined]


def _array(tensor: StoredTensor, data: np.ndarray) -> np.ndarray:
    """Converts the bytes of a tensor, whose number safetensors has already checked."""
    if tensor.dtype is None:
        raise ValueError(f"the dtype {tensor.code} is not supported")
    array = np.ndarray(tensor.shape, tensor.dtype, data)
    if array.dtype == bool and (array.view(np.uint8) > 1).any():
        raise ValueError("a boolean is neither 0 nor 1")
    return array


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "reading and writing safetensors files needs the package safetensors: "
            "pip install 'nmjax[files]'"
        ) from error
    return safetensors
