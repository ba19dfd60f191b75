"""Reads checkpoints of unpacked parameters as trees of NumPy arrays.

| on disk | names | result |
|---|---|---|
| safetensors | `a/b/kernel` | nested dicts |
| safetensors with PyTorch's header or names | `a.b.weight` | nested dicts, in PyTorch's layout |
| `.npz` | as in safetensors | as of safetensors |
| a folder that Orbax wrote | | the saved tree, as dicts and lists |

NNX states saved by Orbax have one more level, `a/b/kernel/value`. It is removed, so that leaves
have the names of the live state.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from nmjax.files.tensor_files import read_note, read_tensors
from nmjax.layouts import optimizer_leaves
from nmjax.trees.leaves import named_leaves, nest

# A module may be called `value`, as in attention. Only in an NNX state does a parameter contain it.
_NNX_LEAF = re.compile(r"(^|/)(kernel|bias|scale|embedding)/value$")


class _Tree(NamedTuple):
    tree: Any
    from_torch: bool


def read_checkpoint(path: str | os.PathLike[str], subtree: str = "") -> Any:
    """Reads a checkpoint, or a part of it.

    Args:
      path: a `.safetensors` or `.npz` file, or a folder that Orbax wrote.
      subtree: the part to return, such as `"params"` or `"state/params"`; by default everything.

    Raises:
      ValueError: the file has another format, contains packed parameters, or has no such subtree.
      OSError: the file cannot be read.
      ImportError: safetensors, or Orbax for a folder, is not installed.
    """
    tree = _read(Path(path)).tree
    # The empty text splits into one empty key.
    for key in filter(None, subtree.split("/")):
        children = _children(tree)
        if key not in children:
            found = ", ".join(children) or "an array"
            raise ValueError(f"{path} has no subtree {subtree!r}: expected {key!r}, found {found}")
        tree = children[key]
    return tree


def read_params(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """Reads only the parameters of a checkpoint that may contain a whole training state.

    Args:
      path: as in `read_checkpoint`.

    Returns:
      The subtree called `params`, and where it is, such as `"state/params"`. Everything, and an
      empty text, if the checkpoint contains nothing else.

    Raises:
      ValueError: as in `read_checkpoint`; several subtrees are called `params`, or none is although
        there is an optimizer state.
    """
    tree, from_torch = _read(Path(path))
    # A PyTorch module may have a ParameterList called `params`.
    if from_torch:
        return tree, ""
    names = named_leaves(tree)
    states = optimizer_leaves(names)
    # The moments of variables contain a subtree called `params`, too.
    found = {
        where: params
        for where, params in _find_params(tree, ())
        if any(name.startswith(f"{where}/") for name in names.keys() - states)
    }
    if len(found) > 1:
        raise ValueError(
            f"{path} has several subtrees called params; pass subtree= with one of them: "
            f"{', '.join(found)}"
        )
    if states and not found:
        raise ValueError(
            f"{path} contains an optimizer state, but no subtree called params; pass subtree= with "
            f"the part that holds the parameters. At the top it has {', '.join(_children(tree))}"
        )
    where, params = next(iter(found.items()), ("", tree))
    return (params, where) if len(named_leaves(params)) < len(names) else (tree, "")


def _find_params(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Outermost subtrees called `params`."""
    for key, child in _children(tree).items():
        here = (*path, key)
        if key == "params" and _children(child):
            yield "/".join(here), child
        else:
            yield from _find_params(child, here)


def _children(tree: Any) -> dict[str, Any]:
    if isinstance(tree, dict):
        return {str(key): child for key, child in tree.items()}
    return {str(i): child for i, child in enumerate(tree)} if isinstance(tree, list) else {}


def _read(path: Path) -> _Tree:
    if path.is_dir():
        return _Tree(_without_boxes(_read_orbax(path)), from_torch=False)
    metadata: Mapping[str, str] = {}
    if path.suffix == ".npz":
        tensors = _read_npz(path)
    else:
        tensors, metadata = read_tensors(path)
        if read_note(metadata).get("format") == "packed":
            raise ValueError(f"{path} already contains packed parameters")
    # PyTorch separates names by dots. Files without the header are recognized by their names.
    from_torch = metadata.get("format") == "pt" or not any("/" in name for name in tensors)
    if from_torch:
        tensors = {name.replace(".", "/"): tensor for name, tensor in tensors.items()}
    return _Tree(_without_boxes(nest(tensors)), from_torch)


def _without_boxes(tree: Any) -> Any:
    """Replaces each dict of one `value` by that value, if the tree is an NNX state."""
    if not any(map(_NNX_LEAF.search, named_leaves(tree))):
        return tree

    def is_box(x: Any) -> bool:
        return isinstance(x, dict) and x.keys() == {"value"} and hasattr(x["value"], "shape")

    return jax.tree.map(lambda x: x["value"] if is_box(x) else x, tree, is_leaf=is_box)


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
