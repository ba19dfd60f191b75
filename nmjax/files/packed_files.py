"""Packed parameters on disk: one safetensors file, which names every pattern and axis.

Each array is a tensor: `name` of a dense leaf; `name/values` and `name/codes` of a `PackedNM`;
`name/values`, `name/indices` and, for BSR, `name/row_pointers` of a `PackedBlocks`. The key
`"nmjax"` of the header holds JSON: the format, its version, and for each packed leaf its pattern,
shape, axes and dtype.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from nmjax.files.tensor_files import NOTE, read_note, read_tensors, write_tensors
from nmjax.packed.blocks import PackedBlocks
from nmjax.packed.nm import PackedNM
from nmjax.packed.weight import Packed, is_packed
from nmjax.patterns import parse_pattern
from nmjax.patterns.pattern import LeafPlan
from nmjax.trees.leaves import named_leaves, nest

FORMAT, VERSION = "packed", 1

_AXES = ("reduction_axes", "output_axes", "tap_axes")
_LARGEST = 2**31 - 1  # What XLA indexes.
_DEEPEST = 64


def save_packed(path: str | os.PathLike[str], packed: Any) -> None:
    """Writes packed parameters, dense leaves included, to a safetensors file.

    The file replaces an older one when all of it is on disk, and not before.

    Args:
      path: of the file, by custom `*.safetensors`.
      packed: a tree from `nmjax.pack`. Leaves are stored by name, `"a/b/kernel"`: `load_packed`
        makes nested dicts of that. Lists come back as dicts with keys "0", "1" ..., dataclasses,
        FrozenDicts and NNX states as dicts; boxes are left out, and a "/" inside a key nests.

    Raises:
      TypeError: a leaf is no array, or of a dtype that safetensors does not know.
      ValueError: two leaves, or a leaf and a packed array of another, have one name; a packed leaf
        is not what `nmjax.pack` makes.
      ImportError: safetensors is not installed.
    """
    leaves = named_leaves(packed, is_leaf=is_packed)
    nest(leaves)
    tensors: dict[str, np.ndarray] = {}
    described = {}
    for name, leaf in leaves.items():
        if is_packed(leaf):
            leaf = jax.tree.map(np.asarray, leaf)
            _check(name, leaf)
            described[name] = {**_describe(leaf.leaf_plan), "dtype": leaf.dtype.name}
            arrays = {f"{name}/{field}": array for field, array in _arrays(leaf).items()}
        elif hasattr(leaf, "dtype"):
            arrays = {name: np.asarray(leaf)}
        else:
            raise TypeError(f"{name} is a {type(leaf).__name__}, not an array")
        taken = tensors.keys() & arrays.keys()
        if taken:
            raise ValueError(f"two arrays are both named {taken.pop()!r}; rename a leaf")
        tensors |= arrays
    manifest = {"format": FORMAT, "version": VERSION, "leaves": described}
    write_tensors(path, tensors, {NOTE: json.dumps(manifest)})


def load_packed(path: str | os.PathLike[str]) -> Any:
    """Reads packed parameters from a file, which need not be trusted.

    All that the file says about sizes, indices, dtypes and patterns is checked before it is used,
    and no more memory is taken than a small multiple of the file. Nothing in it is executed.

    Returns:
      Nested dicts of arrays on the default device, with packed leaves.

    Raises:
      ValueError: the file is damaged, forged, of a newer version, or no packed file; or it holds
        64-bit numbers, and JAX is not told to keep those (`jax_enable_x64`).
      ImportError: safetensors is not installed.
    """
    tensors, metadata = read_tensors(path)
    try:
        plans = _read_manifest(metadata)
        leaves: dict[str, Any] = {
            name: _take_packed(name, plan, dtype, tensors) for name, (plan, dtype) in plans.items()
        }
        if leaves.keys() & tensors.keys():
            raise ValueError(f"there are two leaves {(leaves.keys() & tensors.keys()).pop()!r}")
        leaves |= tensors
        for name in leaves:
            if name.count("/") > _DEEPEST:
                raise ValueError(f"{name[:80]!r} ... is nested deeper than {_DEEPEST}")
        return jax.tree.map(_on_device, nest(leaves))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} cannot be loaded: {error}") from error


def _describe(plan: LeafPlan) -> dict[str, Any]:
    axes = {span: list(getattr(plan, span)) for span in _AXES}
    return {"pattern": str(plan.pattern), "shape": list(plan.shape), **axes}


def _arrays(leaf: Packed) -> dict[str, np.ndarray]:
    """The arrays of a packed leaf by field."""
    return {field: getattr(leaf, field) for field in leaf.array_names(leaf.leaf_plan)}


def _read_manifest(metadata: Mapping[str, str]) -> dict[str, tuple[LeafPlan, str]]:
    """The plan and the dtype of each packed leaf."""
    manifest = read_note(metadata)
    if manifest.get("format") != FORMAT:
        raise ValueError("it holds no packed parameters (`python -m nmjax pack` makes such files)")
    version = _typed(manifest.get("version"), int, "the version")
    if version != VERSION:
        raise ValueError(
            f"it is of version {version}, and this nmjax reads version {VERSION}; try a newer one"
        )
    _check_keys(manifest, ("format", "version", "leaves"), "the header")
    leaves = _typed(manifest["leaves"], dict, "the leaves")
    return {name: _read_leaf(name, description) for name, description in leaves.items()}


def _read_leaf(name: str, description: Any) -> tuple[LeafPlan, str]:
    _check_keys(_typed(description, dict, name), ("pattern", "shape", *_AXES, "dtype"), name)
    plan = _read_plan(name, description)
    return plan, _typed(description["dtype"], str, f"the dtype of {name}")


def _read_plan(name: str, description: Mapping[str, Any]) -> LeafPlan:
    shape = _integers(description["shape"], f"the shape of {name}")
    spans = {span: _integers(description[span], f"the {span} of {name}") for span in _AXES}
    text = _typed(description["pattern"], str, f"the pattern of {name}")
    pattern = parse_pattern(text[:100])
    plan = LeafPlan(pattern, shape=shape, **spans)
    named = [axis for span in spans.values() for axis in span]
    if (
        str(pattern) != text
        or not plan.reduction_axes
        or not all(-len(shape) <= axis < 0 for axis in named)
        or len(set(named)) < len(named)
        or pattern.place(plan.axes) != plan.axes
    ):
        raise ValueError(f"{name} of shape {shape} cannot have {text[:100]} along the axes {spans}")
    if not all(1 <= size <= _LARGEST for size in (*shape, plan.inputs, plan.outputs)):
        raise ValueError(f"{name} has an impossible shape: {shape}")
    return plan


def _plan_to_bytes(static: tuple[LeafPlan]) -> bytes:
    return json.dumps(_describe(*static)).encode()


def _plan_from_bytes(data: bytes) -> tuple[LeafPlan]:
    return (_read_plan("a packed argument", json.loads(data)),)


# Programs of `jax.export` may take packed parameters as arguments.
for _kind in (PackedNM, PackedBlocks):
    jax.export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"nmjax.{_kind.__name__}",
        serialize_auxdata=_plan_to_bytes,
        deserialize_auxdata=_plan_from_bytes,
    )


def _take_packed(name: str, plan: LeafPlan, dtype: str, tensors: dict[str, np.ndarray]) -> Packed:
    """Takes the arrays of one leaf out of the tensors, and checks them."""
    kind = Packed.kind_for(plan.pattern)
    arrays: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
    for field in kind.array_names(plan):
        if f"{name}/{field}" not in tensors:
            raise ValueError(f"the tensor {name}/{field} is missing")
        arrays[field] = tensors.pop(f"{name}/{field}")
    values = arrays["values"]
    if values.dtype.name != dtype:
        raise ValueError(f"{name} should be of dtype {dtype[:20]}, its values are {values.dtype}")
    packed = kind(**{**arrays, "leaf_plan": plan})
    _check(name, packed)
    return packed


def _check(name: str, packed: Packed) -> None:
    """Raises ValueError unless the arrays, of NumPy, are what `nmjax.pack` could have made."""
    try:
        if not jnp.issubdtype(packed.dtype, jnp.floating):
            raise ValueError(f"weights of dtype {packed.dtype}")
        if packed.values.size == 0:
            raise ValueError("no weights at all")
        packed.check()
    except ValueError as error:
        raise ValueError(f"{name} is not what nmjax.pack makes: {error}") from error


def _on_device(array: np.ndarray) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"it holds {array.dtype} numbers, which JAX would narrow; call "
            'jax.config.update("jax_enable_x64", True) first'
        )
    return jnp.asarray(array)


def _typed(value: Any, kind: type, what: str) -> Any:
    """The value, if it is of exactly that type: True is no integer here."""
    if type(value) is not kind:
        raise ValueError(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _integers(values: Any, what: str) -> tuple[int, ...]:
    return tuple(_typed(value, int, what) for value in _typed(values, list, what))


def _check_keys(values: Mapping[str, Any], keys: tuple[str, ...], what: str) -> None:
    if values.keys() != set(keys):
        raise ValueError(f"{what} should have the keys {keys}, got {tuple(values)[:20]}")
