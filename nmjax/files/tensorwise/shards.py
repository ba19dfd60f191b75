"""Reads checkpoints in several safetensors files, by the index that lies beside them.

The index, `*.safetensors.index.json`, is JSON: `{"metadata": {...}, "weight_map": {name: file}}`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nmjax.files.file_kinds import INDEX, check_file
from nmjax.files.tensor_files import StoredTensor, TensorFile, open_tensors
from nmjax.tables import printable


@dataclass(frozen=True)
class ShardedFile:
    """The headers of a checkpoint in several files; like a `TensorFile` of all their tensors.

    Attributes:
      path: the index.
      shards: file name -> its header, in the order of the names.
    """

    path: Path
    shards: dict[str, TensorFile]

    @cached_property
    def shard_of(self) -> dict[str, TensorFile]:
        """Name of each tensor -> the file that holds it."""
        return {name: shard for shard in self.shards.values() for name in shard.tensors}

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Name -> what the header says, in the order of the names."""
        return {name: shard.tensors[name] for name, shard in sorted(self.shard_of.items())}

    @property
    def metadata(self) -> dict[str, str]:
        """The text of all headers; of the first shard that has a key, where they differ."""
        merged: dict[str, str] = {}
        for shard in self.shards.values():
            merged = {**shard.metadata, **merged}
        return merged

    @property
    def nbytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.nbytes for shard in self.shards.values())

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Reads tensors one after the other, as `TensorFile.read` does."""
        for path, group in itertools.groupby(names, key=lambda name: self.shard_of[name].path):
            yield from self.shards[path.name].read(group)

    def read_bytes(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of a tensor, as `TensorFile.read_bytes` reads them."""
        return self.shard_of[name].read_bytes(name)


def open_safetensors(path: Path) -> TensorFile | ShardedFile:
    """Reads the headers of a safetensors file, or of all shards that an index names.

    Args:
      path: the file, the index, or a folder with one index.

    Raises:
      ValueError: it is something else; the index and the files disagree.
      ImportError: safetensors is not installed.
    """
    index = find_index(path)
    return open_tensors(path) if index is None else _open_shards(index)


def is_sharded(path: Path) -> bool:
    """Whether a path is the index of a checkpoint in several files, or a folder with one."""
    return find_index(path) is not None


def find_index(path: Path) -> Path | None:
    """The index at a path or in the folder there; None if there is none.

    Raises:
      ValueError: there are several.
    """
    if path.name.endswith(INDEX):
        return path
    found = sorted(path.glob(f"*{INDEX}")) if path.is_dir() else []
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise ValueError(f"{path} has several checkpoints; pass one of their indices: {names}")
    return found[0] if found else None


def _open_shards(index: Path) -> ShardedFile:
    check_file(index)
    try:
        files = _files_of(json.loads(index.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not the index of a sharded checkpoint: {error}") from error
    shards = {name: open_tensors(index.with_name(name)) for name in sorted(set(files.values()))}
    holders = [(name, file) for file, shard in shards.items() for name in shard.tensors]
    wrong = sorted({name for name, _ in set(files.items()) ^ set(holders)})
    if wrong:
        raise ValueError(
            f"{index} and its files disagree about which file holds "
            f"{', '.join(map(printable, wrong[:5]))}{' ...' if len(wrong) > 5 else ''}; download "
            "the checkpoint again"
        )
    return ShardedFile(index, shards)


def _files_of(index: Any) -> dict[str, str]:
    """Name -> file, checked: a forged index could name any file of the machine."""
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError('it has no "weight_map"')
    for file in set(map(str, files.values())):
        if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise ValueError(f"{printable(file)[:80]!r} is not the name of a file beside it")
    return {name: str(file) for name, file in files.items()}
