"""Writes named arrays to safetensors files, and reads files that may be damaged or forged.

The format is a JSON header and raw bytes, so nothing in a file is ever executed. All dtypes of
whole bytes that JAX and safetensors share are supported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from nmjax.files.whole_files import write_whole

# The header's key under which nmjax describes the contents of a file, as JSON.
NOTE = "nmjax"

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
    }.items()
}


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Writes arrays and text to a safetensors file.

    An existing file is replaced only after the new one is completely on disk.

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
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: folder {path.parent} does not exist")
    try:
        write_whole(path, lambda draft: save_file(arrays, draft, metadata=dict(metadata)))
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file.

    Returns:
      Name -> NumPy array, and the text of the header.

    Raises:
      ValueError: it is not a safetensors file, or NumPy does not support one of its dtypes.
      ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    data = Path(path).read_bytes()
    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        arrays = {name: _array(tensor) for name, tensor in tensors}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    # safetensors does not return the header's text. It has already checked what this line reads:
    # 8 bytes with a length, and JSON of that length.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return arrays, header.get("__metadata__") or {}


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


def _array(tensor: Mapping[str, Any]) -> np.ndarray:
    """Converts a tensor from safetensors, which has already checked its size."""
    if tensor["dtype"] not in _DTYPES:
        raise ValueError(f"the dtype {tensor['dtype']} is not supported")
    array = np.ndarray(tensor["shape"], _DTYPES[tensor["dtype"]], tensor["data"])
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
