"""Reads folders that Orbax wrote: shapes first, and arrays only when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nmjax.files.file_kinds import READ, check_folder


@dataclass(frozen=True)
class OrbaxFolder:
    """A checkpoint of Orbax, of which only the metadata has been read.

    Attributes:
      path: the folder that contains `_METADATA`.
      tree: the saved tree, as dicts and lists. Leaves have a `shape` and a `dtype`, and None stands
        for what is not an array.
    """

    path: Path
    tree: Any

    def read(self, paths: Iterable[jax.tree_util.KeyPath]) -> Iterator[tuple[Any, np.ndarray]]:
        """Reads the leaves at some paths, all at once."""
        ocp, wanted = _orbax(self.path), set(paths)
        item = jax.tree.map_with_path(
            lambda path, leaf: leaf if path in wanted else ocp.PLACEHOLDER, self.tree
        )
        # NumPy arrays do not need the devices that the checkpoint was saved from.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self.tree)
        tree = ocp.PyTreeCheckpointHandler().restore(
            self.path, args=ocp.args.PyTreeRestore(item=item, restore_args=as_numpy)
        )
        for path, leaf in jax.tree.leaves_with_path(tree):
            if path in wanted:
                yield path, np.asarray(leaf)


def open_orbax(path: Path) -> OrbaxFolder:
    """Reads what a checkpoint contains.

    Args:
      path: the folder of a tree, or of a step with one tree and files beside it, as the
        CheckpointManager of Orbax writes.

    Raises:
      ValueError: the folder is something else; the message names folders in it that may be meant.
      ImportError: Orbax is not installed.
    """
    check_folder(path)
    ocp = _orbax(path)
    folder = _folder_of_tree(path).absolute()
    metadata = ocp.PyTreeCheckpointHandler().metadata(folder)
    tree = jax.tree.map(
        lambda leaf: leaf if hasattr(leaf, "shape") else None, getattr(metadata, "tree", metadata)
    )
    return OrbaxFolder(folder, tree)


def _folder_of_tree(path: Path) -> Path:
    if (path / "_METADATA").is_file():
        return path
    folders = sorted(child for child in path.iterdir() if child.is_dir())
    trees = [child for child in folders if (child / "_METADATA").is_file()]
    if len(trees) == 1:
        return trees[0]
    if trees:
        raise ValueError(
            f"{path} has several trees; pass one of them: {', '.join(map(str, trees))}"
        )
    steps = _steps(path) or _steps(path / "checkpoints")
    if steps:
        raise ValueError(
            f"{path} holds checkpoints of several steps; pass one of them, such as {steps[-1]}"
        )
    raise ValueError(
        f"{path} is not an Orbax checkpoint; pass the folder that contains _METADATA ({READ})"
    )


def _steps(path: Path) -> list[Path]:
    """The folders of a CheckpointManager, which are named by numbers of steps."""
    folders = [child for child in path.glob("*") if child.name.isdecimal() and child.is_dir()]
    return sorted(folders, key=lambda folder: int(folder.name))


def _orbax(path: Path) -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            f"{path} is a folder, and reading an Orbax checkpoint needs a package: "
            "pip install orbax-checkpoint"
        ) from error
    return orbax.checkpoint
