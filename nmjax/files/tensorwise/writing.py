"""Writes safetensors files whose tensors come one after the other and are never all in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nmjax.files.tensor_files import StoredTensor
from nmjax.files.whole_files import write_whole

# The format's writers begin the data at a multiple of this.
_ALIGNMENT = 8

# The name of a tensor, and its bytes in parts.
Parts = tuple[str, Iterable[np.ndarray]]


def write_parts(
    path: Path,
    header: Mapping[str, StoredTensor],
    tensors: Iterable[Parts],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file whose shapes are known before its numbers.

    An existing file is replaced only after the new one is completely on disk.

    Args:
      path: the file to write.
      header: name -> shape, dtype and size of each tensor, in the order of the file. Put those with
        larger numbers first: readers may want numbers at multiples of their size.
      tensors: the bytes of each of these tensors once, in any order; each is used before the next
        is asked for.
      metadata: text for the header.

    Raises:
      ValueError: a tensor comes twice, never, or with another number of bytes.
      OSError: the file cannot be written.
    """
    begins, end = {}, 0
    for name, tensor in header.items():
        begins[name], end = end, end + tensor.nbytes
    entries = {
        name: {
            "dtype": tensor.code,
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], begins[name] + tensor.nbytes],
        }
        for name, tensor in header.items()
    }
    text = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)

    def write(draft: Path) -> None:
        with draft.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            missing = set(header)
            for name, parts in tensors:
                if name not in missing:
                    raise ValueError(f"{name} is written twice, or has no entry in the header")
                missing.remove(name)
                file.seek(8 + len(text) + begins[name])
                _write_tensor(file, name, parts, header[name].nbytes)
            if missing:
                raise ValueError(f"these tensors are missing: {sorted(missing)}")

    write_whole(path, write)


def _write_tensor(file: BinaryIO, name: str, parts: Iterable[np.ndarray], nbytes: int) -> None:
    written = 0
    for part in parts:
        written += part.nbytes
        if written > nbytes:
            break
        # NumPy has no buffers of JAX's own dtypes, but views of their bytes.
        file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    if written != nbytes:
        raise ValueError(f"{name} should have {nbytes:,} bytes, but has {written:,} or more")
