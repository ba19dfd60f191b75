"""Saves packed parameters in a safetensors file, and loads them.

Each array is a tensor. A dense leaf is stored as `name`, a `PackedNM` as `name/values` and
`name/codes`, and a `PackedBlocks` as `name/values`, `name/indices` and, for BSR,
`name/row_pointers`. The header's key `"nmjax"` holds JSON: the format, its version, and the
pattern, shape, axes and dtype of each packed leaf.
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
_LARGEST = 2**31 - 1  # The largest size that XLA can index.
# JAX walks trees recursively, and a forged name must not exhaust the stack.
_DEEPEST = 64


def save_packed(path: str | os.PathLike[str], packed: Any) -> None:
    """Writes packed and dense parameters to a safetensors file.

    An existing file is replaced only after the new one is completely on disk.

    Args:
      path: the file, usually `*.safetensors`.
      packed: a tree from `nmjax.pack`. Leaves are stored by name, such as `"a/b/kernel"`, and
        `load_packed` returns nested dicts. So lists become dicts with the keys "0", "1" ...;
        dataclasses, FrozenDicts and NNX states become dicts; leaves lose their boxes; and a "/"
        inside a key nests.

    Raises:
      TypeError: a leaf is not an array, or safetensors does not know its dtype.
      ValueError: two arrays would have the same name; a packed leaf is not what `nmjax.pack` makes.
      ImportError: safetensors is not installed.
    """
    leaves = named_leaves(packed, is_leaf=is_packed)
    nest(leaves)
    tensors: dict[str, np.ndarray] = {}
    described = {}
    for name, leaf in leaves.items():
        if is_packed(leaf):
            # On the host, where _check can read values without tracing or compiling anything.
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
            raise ValueError(f"two arrays would be named {taken.pop()!r}; rename a leaf")
        tensors |= arrays
    manifest = {"format": FORMAT, "version": VERSION, "leaves": described}
    write_tensors(path, tensors, {NOTE: json.dumps(manifest)})


def load_packed(path: str | os.PathLike[str]) -> Any:
    """Reads packed parameters from a file. The file may come from an untrusted source.

    Every size, index, dtype and pattern in the file is checked before it is used. Loading takes at
    most a small multiple of the file's size in memory, and never executes anything from the file.

    Returns:
      Nested dicts of arrays on the default device, with packed leaves.

    Raises:
      ValueError: the file is damaged, forged, not a packed file or from a newer version; or it
        contains 64-bit numbers and `jax_enable_x64` is off.
      ImportError: safetensors is not installed.
    """
    tensors, metadata = read_tensors(path)
    try:
        plans = _read_manifest(metadata)
        leaves: dict[str, Any] = {
            name: _take_packed(name, plan, dtype, tensors) for name, (plan, dtype) in plans.items()
        }
        if leaves.keys() & tensors.keys():
            both = (leaves.keys() & tensors.keys()).pop()
            raise ValueError(f"two leaves are named {both!r}")
        leaves |= tensors
        for name in leaves:
            if name.count("/") > _DEEPEST:
                raise ValueError(f"{name[:80]!r} ... has more than {_DEEPEST} levels")
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
        raise ValueError("it has no packed parameters (`python -m nmjax pack` writes such files)")
    version = _typed(manifest.get("version"), int, "the version")
    if version != VERSION:
        raise ValueError(
            f"it has version {version}, but this nmjax reads version {VERSION}; update nmjax"
        )
    # Unknown keys may change the meaning of known ones, so they are errors too.
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
    pattern = parse_pattern(text[:100])  # A forged text may have megabytes of digits.
    reduction, output, taps = (spans[span] for span in _AXES)
    plan = LeafPlan(pattern, reduction, output, shape, taps)
    named = [axis for span in spans.values() for axis in span]
    # save_packed writes the canonical spelling; another one means that the file was forged.
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


# So that programs from `jax.export` can take packed parameters as arguments.
for _kind in (PackedNM, PackedBlocks):
    jax.export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"nmjax.{_kind.__name__}",
        serialize_auxdata=_plan_to_bytes,
        deserialize_auxdata=_plan_from_bytes,
    )


def _take_packed(name: str, plan: LeafPlan, dtype: str, tensors: dict[str, np.ndarray]) -> Packed:
    """Removes the arrays of one leaf from the tensors, and checks them."""
    kind = Packed.kind_for(plan.pattern)
    arrays: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
    for field in kind.array_names(plan):
        if f"{name}/{field}" not in tensors:
            raise ValueError(f"the tensor {name}/{field} is missing")
        arrays[field] = tensors.pop(f"{name}/{field}")
    values = arrays["values"]
    if values.dtype.name != dtype:
        raise ValueError(f"{name} should have dtype {dtype[:20]}, but has {values.dtype}")
    packed = kind(**{**arrays, "leaf_plan": plan})
    _check(name, packed)
    return packed


def _check(name: str, packed: Packed) -> None:
    """Raises ValueError if `nmjax.pack` could not have made these NumPy arrays."""
    try:
        if not jnp.issubdtype(packed.dtype, jnp.floating):
            raise ValueError(f"weights of dtype {packed.dtype}")
        if packed.values.size == 0:
            raise ValueError("it has no weights")
        packed.check()
    except ValueError as error:
        raise ValueError(f"{name} is not what nmjax.pack makes: {error}") from error


def _on_device(array: np.ndarray) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"it contains {array.dtype} numbers, which JAX would truncate; call "
            'jax.config.update("jax_enable_x64", True) first'
        )
    return jnp.asarray(array)


def _typed(value: Any, kind: type, what: str) -> Any:
    """Returns the value if it has exactly that type: `isinstance` would accept True as an int."""
    if type(value) is not kind:
        raise ValueError(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _integers(values: Any, what: str) -> tuple[int, ...]:
    return tuple(_typed(value, int, what) for value in _typed(values, list, what))


def _check_keys(values: Mapping[str, Any], keys: tuple[str, ...], what: str) -> None:
    if values.keys() != set(keys):
        raise ValueError(f"{what} should have the keys {keys}, got {tuple(values)[:20]}")
