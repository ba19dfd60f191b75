"""Converts weights between JAX and PyTorch: names, axes, and safetensors files.

| JAX name | PyTorch name | JAX axes | PyTorch axes |
|---|---|---|---|
| `a/kernel` | `a.weight` | (in, out) | (out, in) |
| `a/kernel` | `a.weight` | (*spatial, in, out) | (out, in, *spatial) |
| `query/kernel` of attention | `query.weight` | (in, heads, head) | (heads * head, in) |
| `out/kernel` of attention | `out.weight` | (heads, head, out) | (out, heads * head) |
| `query/bias` of attention | `query.bias` | (heads, head) | (heads * head) |
| `a/w` of Haiku | `a.w` | as `a/kernel` | as `a.weight` |
| `a/scale`, `a/embedding` | `a.weight` | the same | the same |
| `a/mean`, `a/var` | `a.running_mean`, `a.running_var` | the same | the same |

Other leaves keep their names and axes. PyTorch stores transposed convolutions differently, but
their names and shapes look like those of other convolutions: convert them by hand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.files.tensor_files import NOTE, write_tensors
from nmjax.layouts import Axes, Shape, layout, size_along
from nmjax.packed.packing import unpack
from nmjax.packed.weight import is_packed
from nmjax.plans import Plan
from nmjax.trees.leaves import map_named, named_leaves
from nmjax.trees.path_rules import PathRules, as_rules, first_match
from nmjax.trees.spans import Span, merge, split, stack_axes

_RENAMED = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
# Entries of a PyTorch state dict that have no leaf in a JAX tree.
_COUNTERS = r"num_batches_tracked$"


def to_torch(params: Any) -> dict[str, np.ndarray]:
    """Converts parameters to a PyTorch state dict of NumPy arrays.

    Args:
      params: parameters, and batch statistics if any. Packed leaves are unpacked.

    Raises:
      ValueError: two leaves have the same PyTorch name; a kernel is a stack of layers; the axes of
        a kernel are unknown.

    >>> state = to_torch({"a": {"kernel": jnp.zeros((3, 3, 8, 16)), "bias": jnp.zeros(16)}})
    >>> {name: array.shape for name, array in state.items()}
    {'a.bias': (16,), 'a.weight': (16, 8, 3, 3)}
    """
    # PyTorch has no packed weights in a state dict, so zeros are written out.
    leaves = named_leaves(unpack(params))
    shapes = {name: np.shape(leaf) for name, leaf in leaves.items()}
    state: dict[str, np.ndarray] = {}
    for name, leaf in leaves.items():
        if torch_name(name) in state:
            raise ValueError(f"{name} and another leaf would both become {torch_name(name)!r}")
        merged = merge(np.asarray(leaf), _spans(name, shapes))
        # np.ascontiguousarray would give a scalar an axis.
        state[torch_name(name)] = np.ascontiguousarray(merged) if merged.ndim else merged
    return state


def from_torch(
    state: Mapping[str, Any],
    params: Any,
    *,
    names: Callable[[str], str] | None = None,
    ignore: PathRules = (),
) -> Any:
    """Converts a PyTorch state dict to parameters.

    Args:
      state: PyTorch name -> array or detached tensor, as `state_dict()` returns them.
      params: a tree with the structure and shapes of the result: arrays or ShapeDtypeStructs.
      names: JAX name -> PyTorch name; by default `nmjax.files.torch_layout.torch_name`.
      ignore: path rules for entries that no leaf uses. Batch counters are always ignored.

    Returns:
      The tree with the arrays of the state, in the state's dtypes.

    Raises:
      ValueError: leaves have no entry, or one of another shape (the message lists all such leaves);
        an entry has no leaf.
    """
    leaves = named_leaves(params)
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    wanted = {name: (names or torch_name)(name) for name in leaves}
    found = _find(state, wanted, shapes)
    rules = (*as_rules(ignore), _COUNTERS)
    # An entry that nothing uses usually means a wrong name, so it is an error.
    left = [name for name in state.keys() - set(wanted.values()) if not first_match(rules, name)]
    if left:
        raise ValueError(
            f"no leaf uses these entries: {sorted(left)}. Map names to them (names=), or ignore "
            "them (ignore=)"
        )
    return map_named(lambda name, _: jnp.asarray(found[name]), params)


def masks_from_torch(
    state: Mapping[str, Any],
    params: Any,
    plan: Plan,
    *,
    names: Callable[[str], str] | None = None,
    suffix: str = "_mask",
) -> dict[str, jax.Array]:
    """Converts masks from a PyTorch state dict, such as those of `torch.nn.utils.prune`.

    Args:
      state: PyTorch name -> tensor or array of zeros and ones, one for each planned leaf.
      params: a tree with the structure and shapes of the parameters.
      plan: from `nmjax.make_plan`.
      names: JAX name -> PyTorch name, without the suffix.
      suffix: follows the weight's name in the name of its mask.

    Returns:
      Leaf name -> boolean array, True = kept, for `nmjax.prune` and `nmjax.pack`.

    Raises:
      ValueError: a planned leaf has no mask, or its mask has another shape or other numbers than
        0 and 1.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(params).items()}
    wanted = {name: (names or torch_name)(name) + suffix for name in plan}
    found = _find(state, wanted, shapes)
    for name, mask in found.items():
        if not np.isin(mask, (0, 1)).all():
            raise ValueError(f"{wanted[name]} is not a mask: it has values other than 0 and 1")
    return {name: jnp.asarray(mask != 0) for name, mask in found.items()}


def save_torch(path: str | os.PathLike[str], params: Any) -> None:
    """Writes dense weights, including zeros, to a safetensors file in PyTorch's names and layout.

    Any library that reads safetensors can load the file. The header stores the patterns of packed
    leaves under the key `"nmjax"`.

    Args:
      path: the file to write.
      params: parameters, packed or pruned.

    Raises:
      ValueError: as in `to_torch`.
      ImportError: safetensors is not installed.
    """
    leaves = named_leaves(params, is_leaf=is_packed)
    patterns = {
        torch_name(name): str(leaf.leaf_plan.pattern)
        for name, leaf in leaves.items()
        if is_packed(leaf)
    }
    note = {"format": "dense", "version": 1, "patterns": patterns}
    write_tensors(path, to_torch(params), {"format": "pt", NOTE: json.dumps(note)})


def torch_name(name: str) -> str:
    """Returns the PyTorch name of a leaf.

    >>> torch_name("encoder/Dense_0/kernel")
    'encoder.Dense_0.weight'
    """
    *path, leaf = name.split("/")
    return ".".join([*path, _RENAMED.get(leaf, leaf)])


def _find(
    state: Mapping[str, Any], wanted: Mapping[str, str], shapes: Mapping[str, Shape]
) -> dict[str, np.ndarray]:
    """Leaf name -> its entry, in JAX's axes."""
    found: dict[str, np.ndarray] = {}
    complaints = []
    for name, entry in wanted.items():
        shape, spans = shapes[name], _spans(name, shapes)
        expected = tuple(size_along(shape, span) for span in spans)
        if entry not in state:
            complaints.append(f"  {name}: no entry {entry!r}")
        elif tuple(state[entry].shape) != expected:
            complaints.append(
                f"  {name} of shape {shape}: {entry!r} should have shape {expected}, "
                f"got {tuple(state[entry].shape)}"
            )
        else:
            found[name] = split(_as_numpy(state[entry]), shape, spans)
    if complaints:
        raise ValueError("the state dict does not match:\n" + "\n".join(complaints))
    return found


def _spans(name: str, shapes: Mapping[str, Shape]) -> list[Span]:
    """For each axis in PyTorch, the axes of the leaf that it combines."""
    shape, leaf = shapes[name], name.rpartition("/")[-1]
    every = tuple(range(-len(shape), 0))
    if leaf == "bias" and every:
        return [every]
    if leaf not in ("kernel", "w") or len(shape) < 2:
        return [(axis,) for axis in every]
    axes = layout(name, shapes)
    if isinstance(axes, str):  # Depthwise convolutions have the same layout as others.
        axes = Axes((-2,), (-1,), every[:-2])
    # PyTorch's order: outputs, inputs, spatial axes. Heads and head size become one axis.
    spans = [axes.output, axes.reduction, *((tap,) for tap in axes.taps or ())]
    if axes.taps is None or stack_axes(len(shape), spans):
        raise ValueError(
            f"{name} of shape {shape} may be a stack of layers, which PyTorch has no layout for; "
            "split it into layers first"
        )
    return spans


def _as_numpy(x: Any) -> np.ndarray:
    """Copies an array or a tensor."""
    # Tensors go through JAX, because NumPy cannot read PyTorch's bfloat16.
    if isinstance(x, np.ndarray | jax.Array) or not hasattr(x, "__dlpack__"):
        return np.array(x)
    return np.array(jnp.from_dlpack(x.contiguous() if hasattr(x, "contiguous") else x))
