"""Checkpoints of plain parameters, as trees of NumPy arrays.

| on disk | names | made of them |
|---|---|---|
| safetensors | `a/b/kernel` | nested dicts |
| safetensors with PyTorch's header or names | `a.b.weight` | nested dicts, in PyTorch's layout |
| `.npz` | `a/b/kernel` | nested dicts |
| a folder written by orbax | | the tree that was saved, as dicts and lists |
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
      path: a `.safetensors` or `.npz` file, or a folder that orbax wrote.
      subtree: the name of what to take from it, such as `"params"` or `"state/params"`; all by
        default.

    Raises:
      ValueError: the file is of no such kind, is packed already, or has no such subtree.
      OSError: it cannot be read.
      ImportError: safetensors, or orbax for a folder, is not installed.
    """
    path = Path(path)
    if path.is_dir():
        tree = _read_orbax(path)
    elif path.suffix == ".npz":
        tree = nest(_read_npz(path))
    else:
        tree = _read_safetensors(path)
    for key in filter(None, subtree.split("/")):
        if not isinstance(tree, dict) or key not in tree:
            there = ", ".join(map(str, tree)) if isinstance(tree, dict) else "no dict"
            raise ValueError(f"{path} has no subtree {subtree!r}; where {key!r} should be: {there}")
        tree = tree[key]
    return tree


def _read_safetensors(path: Path) -> Any:
    tensors, metadata = read_tensors(path)
    if read_note(metadata).get("format") == "packed":
        raise ValueError(f"{path} holds packed parameters already")
    if metadata.get("format") == "pt" or not any("/" in name for name in tensors):
        tensors = {name.replace(".", "/"): tensor for name, tensor in tensors.items()}
    return nest(tensors)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: arrays[name] for name in arrays.files}
    except OSError:
        raise
    except Exception as error:  # The zip and array readers raise many kinds.
        raise ValueError(f"{path} is no .npz file of plain arrays: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "V":
            raise ValueError(
                f"{path}: the dtype of {name} was lost; .npz files cannot hold bfloat16, use "
                "safetensors"
            )
    return tensors


def _read_orbax(path: Path) -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            f"{path} is a folder, and reading a checkpoint of orbax needs the package: "
            "pip install orbax-checkpoint"
        ) from error
    checkpointer = ocp.PyTreeCheckpointer()
    metadata = checkpointer.metadata(path.absolute())
    if metadata is None or metadata.item_metadata is None:
        raise ValueError(f"{path} is no checkpoint of orbax; name the folder that holds _METADATA")
    # As NumPy arrays, whatever devices they were saved from.
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.item_metadata.tree
    )
    return checkpointer.restore(path.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))
