"""Writes a checkpoint again with some of its tensors pruned, one tensor after the other.

Names, shapes, dtypes and the text of the headers stay, and so does the split into files, so what
loaded the checkpoint loads the pruned one. Bytes of other tensors are copied as they are, whatever
their dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from nmjax.files.checkpoints import Checkpoint
from nmjax.files.tensor_files import NOTE, StoredTensor, TensorFile
from nmjax.files.tensorwise.shards import ShardedFile
from nmjax.files.tensorwise.writing import Parts, write_parts
from nmjax.files.whole_files import check_target, write_whole
from nmjax.masks.scores import magnitude
from nmjax.plans import LeafPlan, Plan
from nmjax.pruning import prune_leaf
from nmjax.trees.leaves import named_leaves

# Prunes the leaf of a name; it may change the array that it is given.
PruneOne = Callable[[str, LeafPlan, np.ndarray], np.ndarray]

# Bytes of a tensor that are pruned at once, if the pattern allows it to be cut.
SLAB = 2**22


def write_pruned(out: Path, checkpoint: Checkpoint, plan: Plan, prune_one: PruneOne) -> list[Path]:
    """Writes a checkpoint whose planned leaves are pruned.

    Args:
      out: the file to write; of a checkpoint in several files, also the folder for the same files,
        which may not exist yet.
      checkpoint: what to read.
      plan: of its tree.
      prune_one: prunes one leaf.

    Returns:
      The files with tensors.

    Raises:
      ValueError: `out` is a folder, but the checkpoint is one file.
      OSError: a file cannot be written.
    """
    check_output(out, checkpoint)
    leaves = named_leaves(checkpoint.tree)
    # What came from a file keeps the name that it had there.
    names = {leaf.key if isinstance(leaf.key, str) else name: name for name, leaf in leaves.items()}
    header = _header(checkpoint, names)
    patterns = {key: str(plan[name].pattern) for key, name in names.items() if name in plan}

    def write(path: Path, part: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> Path:
        mine = {key: pattern for key, pattern in patterns.items() if key in part}
        note = json.dumps({"format": "dense", "version": 1, "patterns": mine})
        # Tensors of unknown dtypes have no leaf.
        parts = _parts(checkpoint, plan, prune_one, {key: names.get(key, "") for key in part})
        write_parts(path, part, parts, {**metadata, NOTE: note})
        return path

    source = checkpoint.safetensors
    if not isinstance(source, ShardedFile) or not is_folder(out):
        return [write(out, header, checkpoint.metadata)]
    out.mkdir(exist_ok=True)
    # By file name. A part of the checkpoint may need only some files.
    split: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in header.items():
        split.setdefault(source.shard_of[key].path.name, {})[key] = tensor
    written = [
        write(out / file, part, source.shards[file].metadata) for file, part in split.items()
    ]
    # Last: what an interrupted run leaves has no index.
    _write_index(out / source.path.name, source, split)
    return written


def _write_index(
    path: Path, source: ShardedFile, split: Mapping[str, Mapping[str, StoredTensor]]
) -> None:
    index = json.loads(source.path.read_text(encoding="utf-8"))
    index["weight_map"] = {key: file for file, part in split.items() for key in part}
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        index["metadata"]["total_size"] = sum(x.nbytes for p in split.values() for x in p.values())
    text = json.dumps(index, indent=2) + "\n"
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def is_folder(out: Path) -> bool:
    """Whether a path is meant to be a folder: it is one, or it is new and has no suffix."""
    return out.is_dir() or (not out.exists() and out.suffix == "")


def check_output(out: Path, checkpoint: Checkpoint) -> None:
    """Checks where a checkpoint is to be written, before any work is done for it.

    Raises:
      ValueError: it would replace the checkpoint.
      OSError: it cannot be written.
    """
    source = checkpoint.safetensors
    shards = source.shards.values() if isinstance(source, ShardedFile) else ()
    if not shards or not is_folder(out):
        check_target(out)
    elif not out.parent.is_dir():
        raise FileNotFoundError(f"{out} cannot be written: folder {out.parent} does not exist")
    for path in (checkpoint.path, *(shard.path for shard in shards)):
        for target in (out, out / path.name) if shards else (out,):
            if target.is_file() and path.exists() and target.samefile(path):
                raise ValueError(
                    f"--out {out} would replace the checkpoint {checkpoint.path}: choose another "
                    f"{'folder' if shards else 'file'}"
                )


def prune_in_slabs(leaf: LeafPlan, w: np.ndarray, slab: int = SLAB) -> np.ndarray:
    """Prunes a weight by magnitude in place, a slab at a time where its pattern allows that.

    The result is that of `nmjax.prune`: what competes for places is in one slab.

    Args:
      leaf: its part of a plan.
      w: the weight.
      slab: bytes of a slab; more where the pattern needs them together.
    """
    w = w if w.flags.writeable else w.copy()
    axis, step = _cut(leaf, w, slab)
    for begin in range(0, w.shape[axis], step):
        view = np.moveaxis(w, axis, 0)[begin : begin + step]
        pruned = prune_leaf(jnp.asarray(np.moveaxis(view, 0, axis)), leaf, magnitude)
        view[...] = np.moveaxis(np.asarray(pruned), axis, 0)
    return w


def _cut(leaf: LeafPlan, w: np.ndarray, slab: int) -> tuple[int, int]:
    """The axis to cut a weight along, and the length of a slab."""
    # Axis -> the length that must stay together.
    whole = dict.fromkeys(range(-w.ndim, 0), 1)
    for part in leaf.pattern.wholes(leaf.shape, leaf.axes):
        for axis in part.axes:
            length = part.length if len(part.axes) == 1 else w.shape[axis]
            whole[axis] = max(whole[axis], length)
    slabs = max(1, -(-w.nbytes // slab))
    # The most slabs that an axis allows, and of such axes the first, whose slabs lie together.
    axis = max(whole, key=lambda axis: min(slabs, w.shape[axis] // whole[axis]))
    step = -(-w.shape[axis] // slabs)
    return axis, -(-step // whole[axis]) * whole[axis]


def _header(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, StoredTensor]:
    """What is written, in the order of the source or with the largest numbers first."""
    source = checkpoint.safetensors
    if source is None:
        leaves = named_leaves(checkpoint.tree)
        stored = {key: StoredTensor.of(key, leaves[name]) for key, name in names.items()}
        wide = {key: leaves[name].dtype.itemsize for key, name in names.items()}
        return {key: stored[key] for key in sorted(stored, key=lambda key: (-wide[key], key))}
    keys = [*names, *checkpoint.left_out]
    return {key: source.tensors[key] for key in sorted(keys, key=_place(source))}


def _place(source: TensorFile | ShardedFile) -> Callable[[str], tuple[str, int]]:
    """Where a tensor is: its file, and its position there."""

    def place(key: str) -> tuple[str, int]:
        file = source.shard_of[key] if isinstance(source, ShardedFile) else source
        return str(file.path), file.tensors[key].begin

    return place


def _parts(
    checkpoint: Checkpoint, plan: Plan, prune_one: PruneOne, names: Mapping[str, str]
) -> Iterator[Parts]:
    """The bytes of some tensors of the checkpoint, given their names in the file and the tree."""
    source = checkpoint.safetensors
    if source is None:
        leaves = named_leaves(checkpoint.tree)
        key_of = {leaves[name].key: key for key, name in names.items()}
        for stored, array in checkpoint.read_all(key_of):
            name = names[key_of[stored]]
            yield key_of[stored], [prune_one(name, plan[name], array) if name in plan else array]
        return
    for key, name in names.items():
        if name in plan:
            # Lazy, and in no variable: the array is gone before the next one is read.
            read = source.read([key])
            yield key, (prune_one(name, plan[name], array) for _, array in read)
        else:
            yield key, source.read_bytes(key)
