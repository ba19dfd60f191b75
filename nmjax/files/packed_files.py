"""Saves packed parameters in a safetensors file, and loads them.

Each array is a tensor. A dense leaf is stored as `name`, a `PackedNM` as `name/values` and
`name/codes`, and a `PackedBlocks` as `name/values`, `name/indices` and, for BSR,
`name/row_pointers`; a `Quantized` has `name/scales` besides. A random key is stored as its numbers.
The header's key `"nmjax"` holds JSON: the format, its version, the pattern, shape, axes and dtype
of each packed leaf, which ones are quantized, the kind of each random key, and the names of leaves
that are not arrays.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.files.file_kinds import check_path
from nmjax.files.narrowing import as_jax
from nmjax.files.packed_manifest import (
    Leaf,
    Manifest,
    as_floating,
    read_manifest,
    write_manifest,
)
from nmjax.files.restoring import restore_like
from nmjax.files.tensor_files import NOTE, TensorFile, open_tensors, write_tensors
from nmjax.packed.quantized import Quantized
from nmjax.packed.weight import Packed, is_packed
from nmjax.ste import check_has_values
from nmjax.tables import printable
from nmjax.trees.leaves import DEEPEST, is_array, is_random_key, named_leaves, nest


def save_packed(path: str | os.PathLike[str], packed: Any) -> None:
    """Writes packed and dense parameters to a safetensors file.

    An existing file is replaced only after the new one is completely on disk.

    Leaves are stored by name, such as `"a/b/kernel"`, without their containers and boxes.
    `load_packed(path, like=tree)` restores the tree's own structure. `load_packed(path)` returns
    nested dicts: lists become dicts with the keys "0", "1" ...; dataclasses, FrozenDicts and NNX
    states become dicts; and a "/" inside a key nests.

    Leaves that are not arrays (functions, text, Python's numbers) are not stored; the file lists
    their names, and `load_packed` takes them from `like`. Random keys are stored and restored.

    Args:
      path: the file, usually `*.safetensors`.
      packed: a tree from `nmjax.pack`. Weights that `nmjax.for_platform` laid out are stored as
        `nmjax.pack` made them.

    Raises:
      TypeError: `path` is not a path; safetensors does not know the dtype of a leaf; a leaf has no
        values, because it is traced or has been donated; no leaf is an array.
      ValueError: two arrays would have the same name; a packed leaf is not what `nmjax.pack` makes.
      OSError: the file cannot be written.
      ImportError: safetensors is not installed.
    """
    if isinstance(packed, str | os.PathLike):
        raise TypeError(
            f"expected packed parameters, got the path {os.fspath(packed)!r}; swap the two "
            "arguments: save_packed(path, packed)"
        )
    check_path(path)
    leaves = named_leaves(packed, is_leaf=is_packed)
    nest(leaves)
    tensors: dict[str, dict[str, np.ndarray]] = {}
    sparse: dict[str, Packed] = {}
    keys: dict[str, str] = {}
    left_out = []
    for name, leaf in leaves.items():
        if is_packed(leaf):
            sparse[name] = leaf = _on_host(name, leaf.portable())
            _check(name, leaf)
            tensors[name] = arrays_of(name, leaf)
        elif is_random_key(leaf):
            tensors[name] = {name: _on_host(name, leaf)}
            keys[name] = _kind_of_key(name, leaf)
        elif is_array(leaf):
            tensors[name] = {name: _on_host(name, leaf)}
        else:
            left_out.append(name)
    check_distinct(tensors)
    if not tensors:
        reason = f"no leaf is an array: {left_out}" if left_out else "the tree has no leaves"
        raise TypeError(f"there is nothing to save, because {reason}")
    flat = {key: array for arrays in tensors.values() for key, array in arrays.items()}
    write_tensors(path, flat, {NOTE: write_manifest(sparse, keys, left_out)})


def load_packed(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Reads packed parameters from a file. The file may come from an untrusted source.

    Every size, index, dtype and pattern in the file is checked before it is used. Loading takes at
    most a small multiple of the file's size in memory, and never executes anything from the file.

    Unless `jax_enable_x64` is on, 64-bit integers become 32-bit ones if all of them fit.

    Args:
      path: the file.
      like: a tree with the structure of the result, such as a model: lists, tuples, dataclasses,
        NNX states, boxes. Its arrays may be dense, packed, or ShapeDtypeStructs. Their names,
        shapes and dtypes must be those of the file, so that nothing is cast in silence. Leaves that
        are not arrays are taken from it.

    Returns:
      The structure of `like` with the file's leaves; without it, nested dicts. Arrays are on the
      default device. Without `like`, it warns if the file names leaves that it does not store.

    Raises:
      TypeError: `path` is not a path.
      ValueError: the file is damaged, forged, not a packed file or from a newer version; or it
        contains 64-bit numbers that do not fit in 32 bits and `jax_enable_x64` is off; or its
        leaves are not those of `like` (the message lists names, shapes and dtypes).
      ImportError: safetensors is not installed.

    >>> import tempfile, nmjax
    >>> layers = [{"kernel": jnp.ones((8, 4))}, {"kernel": jnp.ones((4, 4))}]
    >>> plan = nmjax.make_plan(layers, "2:4")
    >>> file = f"{tempfile.mkdtemp()}/layers.safetensors"
    >>> nmjax.save_packed(file, nmjax.pack(nmjax.prune(layers, plan), plan))
    >>> [layer["kernel"].shape for layer in nmjax.load_packed(file, like=layers)]
    [(8, 4), (4, 4)]
    """
    check_path(path)
    file = open_packed(open_tensors(path))
    try:
        leaves = {name: file.on_device(name, leaf) for name, leaf in file.read()}
        if like is not None:
            return restore_like(like, leaves)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} cannot be loaded: {error}") from error
    if file.manifest.left_out:
        warnings.warn(
            f"{os.fspath(path)} does not store leaves that are not arrays: "
            f"{', '.join(map(printable, file.manifest.left_out))}; pass like= to take them from a "
            "tree that has them",
            stacklevel=2,
        )
    return nest(leaves)


@dataclasses.dataclass(frozen=True)
class PackedFile:
    """The checked header of a packed file; `read` reads its leaves.

    Attributes:
      file: the tensors.
      manifest: what the header says about the leaves.
      dense: names of the leaves that are neither packed nor random keys.
    """

    file: TensorFile
    manifest: Manifest
    dense: list[str]

    def read(self) -> Iterator[tuple[str, Any]]:
        """Reads and checks one leaf after the other: arrays of NumPy, packed or not.

        Raises:
          ValueError: a leaf is damaged or forged.
        """
        yield from self.read_packed()
        yield from self.file.read([*self.manifest.keys, *self.dense])

    def read_packed(self) -> Iterator[tuple[str, Packed]]:
        """Reads and checks the packed leaves."""
        for name, leaf in self.manifest.packed.items():
            fields = {f"{name}/{field}": field for field in leaf.tensors}
            arrays = {fields[stored]: array for stored, array in self.file.read(fields)}
            packed = _made(name, leaf, arrays)
            _check(name, packed)
            yield name, packed

    def on_device(self, name: str, leaf: Any) -> Any:
        """Puts a leaf on the default device, and makes a random key of a key's numbers."""
        leaf = jax.tree.map(partial(as_jax, name), leaf)
        if name not in self.manifest.keys:
            return leaf
        try:
            return jax.random.wrap_key_data(leaf, impl=self.manifest.keys[name][:20])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{printable(name)} is not a random key: {error}") from error


def open_packed(file: TensorFile) -> PackedFile:
    """Checks what the header of a packed file says.

    Raises:
      ValueError: as in `load_packed`.
    """
    try:
        manifest = read_manifest(file.metadata)
        dense = dict.fromkeys(file.tensors)
        for name, leaf in manifest.packed.items():
            for field in leaf.tensors:
                if f"{name}/{field}" not in dense:
                    raise ValueError(f"the tensor {printable(name)}/{field} is missing")
                del dense[f"{name}/{field}"]
        for name in manifest.keys:
            if name not in dense:
                raise ValueError(f"the random key {printable(name)} is missing")
            del dense[name]
        names = [*manifest.packed, *manifest.keys, *dense]
        both = manifest.packed.keys() & {*manifest.keys, *dense}
        if both:
            raise ValueError(f"two leaves are named {both.pop()!r}")
        for name in names:
            if name.count("/") > DEEPEST:
                raise ValueError(f"{name[:80]!r} ... has more than {DEEPEST} levels")
        nest(dict.fromkeys(names))
    except ValueError as error:
        raise ValueError(f"{file.path} cannot be loaded: {error}") from error
    return PackedFile(file, manifest, list(dense))


def arrays_of(name: str, leaf: Any) -> dict[str, Any]:
    """The arrays that store a leaf, or their shapes, by the names of their tensors."""
    if not is_packed(leaf):
        return {name: leaf}
    return {f"{name}/{field}": array for field, array in leaf.stored_arrays().items()}


def check_distinct(tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError if two leaves would be stored under one name."""
    taken: set[str] = set()
    for arrays in tensors.values():
        if both := taken & arrays.keys():
            raise ValueError(f"two arrays would be named {both.pop()!r}; rename a leaf")
        taken |= arrays.keys()


def _made(name: str, leaf: Leaf, arrays: Mapping[str, Any]) -> Packed:
    """Makes a packed leaf of the arrays that store it.

    Raises:
      ValueError: its values have another dtype than the file says.
    """
    kind, plan, values = Packed.kind_for(leaf.plan.pattern), leaf.plan, arrays["values"]
    wanted = "int8" if leaf.is_quantized else leaf.dtype
    if values.dtype.name != wanted:
        raise ValueError(
            f"{printable(name)} should have dtype {wanted[:20]}, but has {values.dtype}"
        )
    held = kind.stored_plan(plan, values.shape)
    if held != plan:
        warnings.warn(
            f"{printable(name)} was packed as {plan.pattern} by an earlier nmjax, which counted "
            f"blocks in floating point; it holds {held.pattern}, and is loaded so",
            stacklevel=2,
        )
    names = (field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
    packed = kind(**{**{name: arrays.get(name) for name in names}, "leaf_plan": held})
    if not leaf.is_quantized:
        return packed
    dtype = as_floating(leaf.dtype, printable(name))
    return Quantized(packed, arrays["scales"], dtype, leaf.inputs, arrays.get("input_steps"))


def _on_host(name: str, leaf: Any) -> Any:
    """Copies a leaf to NumPy, which reads values without tracing or compiling anything."""
    for array in jax.tree.leaves(leaf):
        check_has_values(array, f"{name or 'the leaf'} cannot be saved: it")
    try:
        leaf = jax.random.key_data(leaf) if is_random_key(leaf) else leaf
        host = jax.tree.map(np.asarray, leaf)
    except Exception as error:  # JAX has a class for each of many reasons.
        raise TypeError(f"{name} cannot be saved: {error}") from error
    if any(array.dtype == object for array in jax.tree.leaves(host)):
        raise TypeError(f"{name} cannot be saved: it has no numbers")
    return host


def _kind_of_key(name: str, key: jax.Array) -> str:
    kind = jax.random.key_impl(key)
    if not isinstance(kind, str):
        raise TypeError(f"{name} is a random key of an implementation without a name: {kind}")
    return kind


def _check(name: str, packed: Packed) -> None:
    """Raises ValueError if `nmjax.pack` could not have made these NumPy arrays."""
    try:
        if not jnp.issubdtype(packed.dtype, jnp.floating):
            raise ValueError(f"weights of dtype {packed.dtype}")
        if packed.values.size == 0:
            raise ValueError("it has no weights")
        packed.check()
    except ValueError as error:
        raise ValueError(f"{printable(name)} is not what nmjax.pack makes: {error}") from error
