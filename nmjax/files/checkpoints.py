"""Reads checkpoints of unpacked parameters as trees of NumPy arrays.

| on disk | names | result |
|---|---|---|
| safetensors | `a/b/kernel` | nested dicts |
| safetensors with PyTorch's header or names | `a.b.weight` | nested dicts, in PyTorch's layout |
| `.npz` | as in safetensors | as of safetensors |
| the index of safetensors files, or its folder | as in safetensors | as of safetensors |
| a folder that Orbax wrote | | the saved tree, as dicts and lists |

NNX states saved by Orbax have one more level, `a/b/kernel/value`. It is removed, so that leaves
have the names of the live state.

Names and shapes are read first, and arrays only when they are asked for.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nmjax.files.npz_files import open_npz
from nmjax.files.orbax_folders import open_orbax
from nmjax.files.tensor_files import TensorFile, read_note
from nmjax.files.tensorwise.shards import ShardedFile, is_sharded, open_safetensors
from nmjax.layouts import optimizer_leaves
from nmjax.layouts.axes import Shape
from nmjax.trees.leaves import DEEPEST, named_leaves, nest

# A module may be called `value`, as in attention. Only in an NNX state does a parameter contain it.
_NNX_LEAF = re.compile(r"(^|/)(kernel|bias|scale|embedding)/value$")


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array on disk.

    Attributes:
      shape: sizes of its axes.
      dtype: its dtype.
      key: what it is called there.
    """

    shape: Shape
    dtype: np.dtype
    key: Hashable


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, or a part of it, whose arrays have not been read.

    Attributes:
      path: the file or folder.
      tree: nested dicts and lists of `Stored`.
      where: the part that `tree` is, such as "state/params"; empty for everything.
      from_torch: whether the layout is PyTorch's, and slashes replace the dots in the names.
      metadata: the text in the header of a safetensors file.
      left_out: name -> dtype of tensors that cannot be read.
      safetensors: the headers of the file or files, if they are safetensors.
      read_all: reads arrays by their keys.
    """

    path: Path
    tree: Any
    read_all: Callable[[Iterable[Any]], Iterator[tuple[Any, np.ndarray]]]
    where: str = ""
    from_torch: bool = False
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    safetensors: TensorFile | ShardedFile | None = None

    @property
    def shapes(self) -> Any:
        """The tree with a `jax.ShapeDtypeStruct` for each array."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.tree)

    def read(self) -> Any:
        """Reads the arrays of the tree."""
        leaves, structure = jax.tree.flatten(self.tree)
        arrays = dict(self.read_all([leaf.key for leaf in leaves]))
        return jax.tree.unflatten(structure, [arrays[leaf.key] for leaf in leaves])

    def part(self, subtree: str) -> Checkpoint:
        """A part, such as "params" or "state/params"; everything for an empty text.

        Raises:
          ValueError: there is no such part.
        """
        tree = self.tree
        # The empty text splits into one empty key.
        for key in filter(None, subtree.split("/")):
            children = _children(tree)
            if key not in children:
                found = ", ".join(children) or "an array"
                raise ValueError(
                    f"{self.path} has no subtree {subtree!r}: expected {key!r}, found {found}"
                )
            tree = children[key]
        return self._below(subtree, tree)

    def params(self) -> Checkpoint:
        """The subtree called `params`; everything if the checkpoint contains nothing else.

        Raises:
          ValueError: several subtrees are called `params`, or none is although there is an
            optimizer state.
        """
        # A PyTorch module may have a ParameterList called `params`.
        if self.from_torch:
            return self
        names = named_leaves(self.tree)
        states = optimizer_leaves(names)
        others = names.keys() - states
        # The moments of variables contain a subtree called `params`, too.
        found = {
            where: params
            for where, params in _find_params(self.tree, ())
            if any(name.startswith(f"{where}/") for name in others)
        }
        if len(found) > 1:
            raise ValueError(
                f"{self.path} has several subtrees called params; pass subtree= with one of them: "
                f"{', '.join(found)}"
            )
        if states and not found:
            raise ValueError(
                f"{self.path} contains an optimizer state, but no subtree called params; pass "
                "subtree= with the part that holds the parameters. At the top it has "
                f"{', '.join(_children(self.tree))}"
            )
        where, params = next(iter(found.items()), ("", self.tree))
        if len(named_leaves(params)) == len(names):
            return self
        return self._below(where, params)

    def _below(self, where: str, tree: Any) -> Checkpoint:
        prefix = f"{where}/" if where else ""
        left_out = {
            name: code
            for name, code in self.left_out.items()
            if (name.replace(".", "/") if self.from_torch else name).startswith(prefix)
        }
        return dataclasses.replace(self, tree=tree, where=where, left_out=left_out)


def read_checkpoint(path: str | os.PathLike[str], subtree: str = "") -> Any:
    """Reads a checkpoint, or a part of it.

    It warns of tensors that it leaves out because NumPy and JAX have no such dtype.

    Args:
      path: a `.safetensors` or `.npz` file, the index of several safetensors files
        (`*.safetensors.index.json`) or its folder, or a folder that Orbax wrote.
      subtree: the part to return, such as `"params"` or `"state/params"`; by default everything.

    Raises:
      ValueError: the file has another format, contains packed parameters, or has no such subtree.
      OSError: the file cannot be read.
      ImportError: safetensors, or Orbax for a folder, is not installed.
    """
    return _warned(open_checkpoint(path).part(subtree)).read()


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
    params = _warned(open_checkpoint(path).params())
    return params.read(), params.where


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads names and shapes; raises what `read_checkpoint` raises."""
    path = Path(path)
    if path.is_dir() and not is_sharded(path):
        folder = open_orbax(path)
        tree = jax.tree.map_with_path(
            lambda key, leaf: Stored(tuple(leaf.shape), np.dtype(leaf.dtype), key), folder.tree
        )
        _check_lines(path, named_leaves(tree))
        return Checkpoint(path, _without_boxes(tree), folder.read)
    if path.suffix == ".npz":
        arrays = open_npz(path)
        stored = {name: Stored(x.shape, x.dtype, name) for name, x in arrays.arrays.items()}
        return _nested(Checkpoint(path, stored, arrays.read))
    file = open_safetensors(path)
    if read_note(file.metadata).get("format") == "packed":
        raise ValueError(f"{path} already contains packed parameters")
    known = {n: Stored(x.shape, x.dtype, n) for n, x in file.tensors.items() if x.dtype is not None}
    left_out = {n: x.code for n, x in file.tensors.items() if x.dtype is None}
    return _nested(
        Checkpoint(
            path, known, file.read, metadata=file.metadata, left_out=left_out, safetensors=file
        )
    )


def _nested(flat: Checkpoint) -> Checkpoint:
    """Makes nested dicts of named arrays."""
    names = flat.tree
    # PyTorch separates names by dots. Files without the header are recognized by their names.
    from_torch = flat.metadata.get("format") == "pt" or not any("/" in name for name in names)
    if from_torch:
        names = {name.replace(".", "/"): array for name, array in names.items()}
        if len(names) < len(flat.tree):
            raise ValueError(f"{flat.path}: two names differ only in dots and slashes")
    _check_lines(flat.path, names)
    for name in names:
        if name.count("/") > DEEPEST:
            raise ValueError(f"{flat.path}: {name[:80]!r} ... has more than {DEEPEST} levels")
    try:
        tree = nest(names)
    except ValueError as error:
        raise ValueError(f"{flat.path}: {error}") from error
    return dataclasses.replace(flat, tree=_without_boxes(tree), from_torch=from_torch)


def _check_lines(path: Path, names: Iterable[str]) -> None:
    """Raises ValueError if a name has a line break, which could forge a line of a message."""
    for name in names:
        if "\n" in name or "\r" in name:
            raise ValueError(f"{path}: the name {name[:80]!r} has a line break")


def _warned(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.left_out:
        names = ", ".join(f"{name} ({code})" for name, code in checkpoint.left_out.items())
        warnings.warn(
            f"{checkpoint.path}: these tensors are left out, because NumPy and JAX have no such "
            f"dtypes: {names}",
            stacklevel=3,
        )
    return checkpoint


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


def _without_boxes(tree: Any) -> Any:
    """Replaces each dict of one `value` by that value, if the tree is an NNX state."""
    if not any(map(_NNX_LEAF.search, named_leaves(tree))):
        return tree

    def is_box(x: Any) -> bool:
        return isinstance(x, dict) and x.keys() == {"value"} and hasattr(x["value"], "shape")

    return jax.tree.map(lambda x: x["value"] if is_box(x) else x, tree, is_leaf=is_box)
