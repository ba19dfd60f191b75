"""Saves all variables of NNX modules in a safetensors file, and loads them.

The file is one of `nmjax.save_packed`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from nmjax.files.packed_files import load_packed, save_packed
from nmjax.nnx.forward_pass import check_module
from nmjax.nnx.packed_layers import PackedParam, check_layers, holders, use_packed_products
from nmjax.nnx.variables import named_variables
from nmjax.packed.weight import is_packed
from nmjax.trees.leaves import is_random_key, map_named, named_leaves

Model = TypeVar("Model", bound=nnx.Module)


def save(path: str | os.PathLike[str], model: nnx.Module) -> None:
    """Writes all variables of a module to a safetensors file.

    They are parameters, dense and packed, batch statistics, caches, and random streams. An
    existing file is replaced only after the new one is completely on disk.

    Args:
      path: the file, usually `*.safetensors`.
      model: an NNX module, perhaps from `nmjax.nnx.pack`.

    Raises:
      TypeError: `model` is not an NNX module; a variable holds something that is not an array.
      ValueError: what `nmjax.save_packed` raises.
      ImportError: safetensors is not installed.
    """
    check_module(model)
    leaves = named_leaves(nnx.state(model), is_leaf=is_packed)
    others = {
        n: type(x).__name__
        for n, x in leaves.items()
        if not (is_packed(x) or isinstance(x, jax.Array | np.ndarray))
    }
    if others:
        raise TypeError(
            "only arrays can be saved, but "
            + ", ".join(f"{name} holds a {kind}" for name, kind in others.items())
            + "; make each of them an array, such as nnx.Variable(jnp.array(0))"
        )
    save_packed(path, nnx.state(model))


def load(path: str | os.PathLike[str], model: Model) -> Model:
    """Reads all variables of a module from a file of `save`, into the module itself.

    Layers whose kernels are packed in the file multiply by the packed kernels from then on. The
    file may come from an untrusted source. Nothing changes unless the whole file fits.

    Args:
      path: the file.
      model: an NNX module like the saved one: fresh, or its shapes (`nnx.eval_shape`).

    Returns:
      `model`.

    Raises:
      TypeError: `model` is not an NNX module; what `nmjax.nnx.pack` raises.
      ValueError: the file holds other variables than the module, or variables of other shapes or
        dtypes (the error lists all); what `nmjax.load_packed` raises.
      ImportError: safetensors is not installed.

    >>> import tempfile
    >>> model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/model.safetensors", model)
    ...     other = load(f"{folder}/model.safetensors", nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    >>> bool(other.rngs.key[...] == model.rngs.key[...])
    True
    """
    check_module(model)
    new = named_leaves(load_packed(path), is_leaf=is_packed)
    old = named_leaves(nnx.state(model), is_leaf=is_packed)
    _check_same(old, new, os.fspath(path))
    packed = {name: leaf.leaf_plan for name, leaf in new.items() if is_packed(leaf)}
    check_layers(model, packed)
    variables = named_variables(nnx.state(model))
    was_packed = (name for name, leaf in old.items() if is_packed(leaf))
    # A dense parameter cannot hold a packed weight, nor the other way around.
    changed = {
        name: PackedParam.in_place_of(variables[name], new[name])
        if name in packed
        else nnx.Param(new[name])
        for name in (*packed, *was_packed)
    }
    for layer, attribute, name in holders(model, changed):
        setattr(layer, attribute, changed[name])
        if name in packed:
            use_packed_products(layer)
    nnx.update(model, map_named(lambda name, _: new[name], nnx.state(model), is_leaf=is_packed))
    return model


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> None:
    """Raises ValueError unless a file has a leaf of the same shape and dtype for each leaf."""
    complaints = [f"  {name}: not in the file" for name in old.keys() - new.keys()]
    complaints += [f"  {name}: not in the module" for name in new.keys() - old.keys()]
    complaints += [
        f"  {name}: {_kind(new[name])} in the file, {_kind(old[name])} in the module"
        for name in old.keys() & new.keys()
        if _kind(old[name]) != _kind(new[name])
    ]
    if complaints:
        raise ValueError(
            f"{path} does not fit the module:\n"
            + "\n".join(sorted(complaints))
            + "\nBuild the module with the arguments of the saved one."
        )


def _kind(leaf: Any) -> str:
    """Dtype and shape of a leaf. All implementations of random keys are one kind."""
    kind = "random key" if not is_packed(leaf) and is_random_key(leaf) else leaf.dtype
    return f"{kind}{tuple(leaf.shape)}"
