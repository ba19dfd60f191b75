"""Recognizes files and folders that nmjax does not read, so that errors can say what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# The end of the name of the index of a checkpoint in several files.
INDEX = ".safetensors.index.json"
READ = "nmjax reads .safetensors and .npz files, and folders that Orbax wrote"

_CONVERT_TORCH = (
    "load it in PyTorch and convert its state dict: "
    "safetensors.torch.save_file(state_dict, 'x.safetensors')"
)
# Suffix or first bytes -> what such a file is, and how to convert it.
_SUFFIXES = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), f"it may be PyTorch's; {_CONVERT_TORCH}"),
    ".onnx": "it may be an ONNX model; export its weights to safetensors",
    ".gguf": "it may be a GGUF model; download the model's safetensors instead",
    **dict.fromkeys(
        (".h5", ".hdf5", ".keras"), "it may be Keras's; save its weights with np.savez"
    ),
    ".msgpack": "it may be Flax's; load it with flax.serialization and save it with np.savez",
}
_MAGIC = {
    b"PK\x03\x04": f"it is a zip archive, as PyTorch and NumPy write; {_CONVERT_TORCH}, or give an "
    "archive of NumPy the suffix .npz",
    b"\x80": f"it is pickled, as by old versions of PyTorch; {_CONVERT_TORCH}",
    b"GGUF": _SUFFIXES[".gguf"],
    b"\x89HDF": _SUFFIXES[".h5"],
    b"\x93NUMPY": "it is a single array of NumPy; save named arrays with np.savez",
}


def check_path(path: Any) -> None:
    """Raises TypeError if an argument is not a path."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"the path must be a text or a pathlib.Path, got {type(path).__name__}")


def check_file(path: Path) -> None:
    """Checks that a path is a regular file: a pipe or a device could be read without end.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is something else, or the index of a checkpoint that is not safetensors.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file; {READ}")
    if path.name.endswith(".index.json") and not path.name.endswith(INDEX):
        raise ValueError(f"{path} is the index of files of another format: {_CONVERT_TORCH}")


def foreign_kind(path: Path) -> str:
    """What a file is instead of safetensors, and what to do; empty if nothing is known."""
    with path.open("rb") as file:
        start = file.read(8)
    # A damaged safetensors file may begin with any bytes.
    magic = {} if path.suffix == ".safetensors" else _MAGIC
    text = next((text for magic, text in magic.items() if start.startswith(magic)), "")
    text = _SUFFIXES.get(path.suffix.lower(), text)
    return f": {text} ({READ})" if text else ""


def check_folder(path: Path) -> None:
    """Raises ValueError if a folder holds safetensors files in place of an Orbax checkpoint."""
    files = sorted(path.glob("*.safetensors"))
    if files:
        raise ValueError(
            f"{path} is a folder of safetensors files without an index (*{INDEX}); pass one of the "
            f"files, such as {files[0]} ({READ})"
        )
