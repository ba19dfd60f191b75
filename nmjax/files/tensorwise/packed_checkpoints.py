"""Packs the weights of a checkpoint into a file, one leaf after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.files.checkpoints import Checkpoint
from nmjax.files.packed_files import arrays_of, check_distinct
from nmjax.files.packed_manifest import write_manifest
from nmjax.files.tensor_files import NOTE, StoredTensor
from nmjax.files.tensorwise.pruned_checkpoints import SLAB, prune_in_slabs
from nmjax.files.tensorwise.writing import Parts, write_parts
from nmjax.packed.bits import is_nonzero
from nmjax.packed.packing import describe_misfits, pack
from nmjax.packed.quantizing import quantize
from nmjax.packed.weight import Packed, is_packed
from nmjax.patterns.block1xn import Block1xN
from nmjax.plans import LeafPlan, Plan
from nmjax.pruning import compute_masks
from nmjax.trees.leaves import named_leaves

Quantize = Literal["int8"] | None


def packed_shapes(
    checkpoint: Checkpoint, plan: Plan, *, quantized: Quantize = None
) -> dict[str, Any]:
    """The packed tree by name, with shapes in place of arrays: nothing is read or packed."""
    pack_one = partial(_packed, quantized)
    shapes = named_leaves(checkpoint.shapes)
    return {
        name: jax.eval_shape(lambda w, name=name: pack_one(name, plan[name], w), shape)
        if name in plan
        else shape
        for name, shape in shapes.items()
    }


def write_packed(
    out: Path, checkpoint: Checkpoint, plan: Plan, *, prune: bool, quantized: Quantize = None
) -> None:
    """Writes what `nmjax.save_packed` would write of the packed checkpoint.

    Args:
      out: the file to write.
      checkpoint: what to read.
      plan: of its tree.
      prune: whether to prune the planned leaves by magnitude first.
      quantized: `"int8"` rounds the packed weights as `nmjax.quantize` does.

    Raises:
      ValueError: `prune` is False, and a planned leaf is not sparse (the message lists all).
      OSError: the file cannot be written.
    """
    if not prune:
        _check_sparse(checkpoint, plan)
    shapes = packed_shapes(checkpoint, plan, quantized=quantized)
    arrays = {name: arrays_of(name, leaf) for name, leaf in shapes.items()}
    check_distinct(arrays)
    entries = {key: StoredTensor.of(key, x) for part in arrays.values() for key, x in part.items()}
    wide = {key: x.dtype.itemsize for part in arrays.values() for key, x in part.items()}
    header = {key: entries[key] for key in sorted(entries, key=lambda key: (-wide[key], key))}
    sparse = {name: leaf for name, leaf in shapes.items() if is_packed(leaf)}
    parts = _parts(checkpoint, plan, prune=prune, quantized=quantized)
    write_parts(out, header, parts, {NOTE: write_manifest(sparse, {}, [])})


def _parts(
    checkpoint: Checkpoint, plan: Plan, *, prune: bool, quantized: Quantize
) -> Iterator[Parts]:
    leaves = named_leaves(checkpoint.tree)
    names = {leaf.key: name for name, leaf in leaves.items()}
    for key, array in checkpoint.read_all(names):
        name = names[key]
        leaf: Any = array
        if name in plan:
            if prune:
                array = prune_in_slabs(plan[name], array)
            leaf = pack_in_slabs(name, plan[name], array, quantized=quantized)
        for field, part in arrays_of(name, leaf).items():
            yield field, [part]


def pack_in_slabs(
    name: str, leaf: LeafPlan, w: np.ndarray, slab: int = SLAB, *, quantized: Quantize = None
) -> Packed:
    """Packs a weight in NumPy's memory, a slab of outputs at a time where its pattern allows that.

    Args:
      name: of the leaf, for errors.
      leaf: its part of a plan.
      w: the weight, pruned.
      slab: bytes of a slab; more where the pattern needs them together.
      quantized: as for `write_packed`.
    """
    pack_one = partial(_packed, quantized)
    shape = jax.ShapeDtypeStruct(w.shape, w.dtype)
    whole = jax.eval_shape(partial(pack_one, name, leaf), shape)
    into = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), whole)
    axis, step = _cut_outputs(leaf, w, slab)
    done = [0] * len(jax.tree.leaves(into))
    for begin in range(0, w.shape[axis], step):
        at = [slice(None)] * w.ndim
        at[axis] = slice(begin, begin + step)
        part = w[tuple(at)]
        # Leading axes beyond the plan's are a stack.
        planned = part.shape[w.ndim - len(leaf.shape) :]
        packed = pack_one(name, dataclasses.replace(leaf, shape=planned), part)
        for number, (x, y) in enumerate(zip(*map(jax.tree.leaves, (into, packed)), strict=True)):
            # The axis of the outputs is the one that a slab has less of.
            along = next((i for i in range(x.ndim) if x.shape[i] != y.shape[i]), 0)
            end = done[number] + y.shape[along]
            x[(*[slice(None)] * along, slice(done[number], end))] = y
            done[number] = end
    return into


def _cut_outputs(leaf: LeafPlan, w: np.ndarray, slab: int) -> tuple[int, int]:
    """The axis to cut, and the length of a slab: whole rows of blocks, or outputs of N:M.

    Of several output axes the first is cut, since the outputs of a slab must be neighbors.
    """
    output, pattern = leaf.axes.output, leaf.pattern
    if not output or (isinstance(pattern, Block1xN) and not _rows_are_alike(pattern, output)):
        return -1, w.shape[-1]
    unit = pattern.n if isinstance(pattern, Block1xN) else 1
    step = -(-w.shape[output[0]] // max(1, -(-w.nbytes // slab)))
    return output[0], -(-step // unit) * unit


def _rows_are_alike(pattern: Block1xN, output: tuple[int, ...]) -> bool:
    """Whether rows of blocks are stored one after the other, each a part of one axis."""
    return pattern.uniform and len(output) == 1


def _packed(quantized: Quantize, name: str, leaf: LeafPlan, w: Any) -> Packed:
    plan, params = Plan(((name, leaf),)), {name: w}
    packed = pack(params, plan, compute_masks(params, plan))
    made: Packed = (packed if quantized is None else quantize(packed))[name]
    return made


def _check_sparse(checkpoint: Checkpoint, plan: Plan) -> None:
    names = {x.key: name for name, x in named_leaves(checkpoint.tree).items() if name in plan}
    complaints = []
    for key, array in checkpoint.read_all(names):
        name = names[key]
        text = describe_misfits(is_nonzero(jnp.asarray(array)), plan[name])
        if text:
            complaints.append(f"  {name} {array.shape}: {text}")
    if complaints:
        raise ValueError(
            "these weights are not sparse yet; pass --prune to prune them by magnitude:\n"
            + "\n".join(complaints)
        )
