"""Reads checkpoints of unpacked parameters as trees of NumPy arrays.

| on disk | names | result |
|---|---|---|
| safetensors | `a/b/kernel` | nested dicts |
| safetensors with PyTorch's header or names | `a.b.weight` | nested dicts, in PyTorch's layout |
| `.npz` | `a/b/kernel` | nested dicts |
| a folder that Orbax wrote | | the saved tree, as dicts and lists |
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nmjax.files.tensor_files import read_note, read_tensors
from nmjax.trees.leaves import nest


def read_checkpoint(path: str | os.PathLike[str], subtree: str = "") -> Any:
    """Reads parameters.

    Args:
      path: a `.safetensors` or `.npz` file, or a folder that Orbax wrote.
      subtree: the part to return, such as `"params"` or `"state/params"`; by default everything.

    Raises:
      ValueError: the file has another format, contains packed parameters, or has no such subtree.
      OSError: the file cannot be read.
      ImportError: safetensors, or Orbax for a folder, is not installed.
    """
    path = Path(path)
    if path.is_dir():
        tree = _read_orbax(path)
    elif path.suffix == ".npz":
        tree = nest(_read_npz(path))
    else:
        tree = _read_safetensors(path)
    # The empty text splits into one empty key.
    for key in filter(None, subtree.split("/")):
        if not isinstance(tree, dict) or key not in tree:
            found = ", ".join(map(str, tree)) if isinstance(tree, dict) else "an array"
            raise ValueError(f"{path} has no subtree {subtree!r}: expected {key!r}, found {found}")
        tree = tree[key]
    return tree


def _read_safetensors(path: Path) -> Any:
    tensors, metadata = read_tensors(path)
    if read_note(metadata).get("format") == "packed":
        raise ValueError(f"{path} already contains packed parameters")
    # PyTorch separates names by dots. Files without the header are recognized by their names.
    if metadata.get("format") == "pt" or not any("/" in name for name in tensors):
        tensors = {name.replace(".", "/"): tensor for name, tensor in tensors.items()}
    return nest(tensors)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: arrays[name] for name in arrays.files}
    # A file that cannot be read is not a file of another format.
    except OSError:
        raise
    except Exception as error:  # The zip and array readers raise many types.
        raise ValueError(f"{path} is not an .npz file of plain arrays: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "V":  # What NumPy writes for dtypes that are not its own.
            raise ValueError(
                f"{path}: the dtype of {name} was lost. .npz files cannot store bfloat16; use "
                "safetensors instead"
            )
    return tensors


def _read_orbax(path: Path) -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            f"{path} is a folder, and reading an Orbax checkpoint needs a package: "
            "pip install orbax-checkpoint"
        ) from error
    checkpointer = ocp.PyTreeCheckpointer()
    metadata = checkpointer.metadata(path.absolute())
    if metadata is None or metadata.item_metadata is None:
        raise ValueError(
            f"{path} is not an Orbax checkpoint; pass the folder that contains _METADATA"
        )
    # NumPy arrays do not need the devices that the checkpoint was saved from.
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.item_metadata.tree
    )
    return checkpointer.restore(path.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))
