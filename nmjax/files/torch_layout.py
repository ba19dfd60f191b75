"""Converts weights between JAX and PyTorch: names, axes, and safetensors files.

| JAX name | PyTorch name | JAX axes | PyTorch axes |
|---|---|---|---|
| `a/kernel` | `a.weight` | (in, out) | (out, in) |
| `a/kernel` | `a.weight` | (*spatial, in, out) | (out, in, *spatial) |
| `a/kernel` of ConvTranspose | `a.weight` | (*spatial, in, out) | (in, out, *spatial), reversed |
| `query/kernel` of attention | `query.weight` | (in, heads, head) | (heads * head, in) |
| `out/kernel` of attention | `out.weight` | (heads, head, out) | (out, heads * head) |
| `query/bias` of attention | `query.bias` | (heads, head) | (heads * head) |
| `a/w` of Haiku | `a.w` | as `a/kernel` | as `a.weight` |
| `a/scale`, `a/embedding` | `a.weight` | the same | the same |
| `a/mean`, `a/var` | `a.running_mean`, `a.running_var` | the same | the same |

Other leaves keep their names and axes. In a tree of Flax's collections, such as
`{"params": ..., "batch_stats": ...}`, the names of the collections are left out.

A kernel is converted only if its axes are certain, and a convolution only if it is certain whether
it is transposed: PyTorch stores transposed ones differently, and names and shapes do not
distinguish them. All functions take what is missing:

- `axes`: path rule -> axes of the leaves that match, as in `nmjax.make_plan`. Pass `nmjax.Axes` for
  kernels with more than two axes.
- `plan`: from `nmjax.make_plan`. Its axes are used for leaves that `axes` does not match. Packed
  leaves contain their own.
- `names`: JAX name -> PyTorch name, where the table above does not fit.
- `transposed`: path rules of the kernels of transposed convolutions (`ConvTranspose` of Flax and
  Equinox, `Conv2DTranspose` of Haiku); `()` if there are none. Needed for convolutions whose name
  suggests one, such as `up`, and for those without a name. Flax's own name, `ConvTranspose_0`,
  suffices if the bias shows which axis holds the outputs.
- `transpose_kernel`: path rules of those for which Flax has `transpose_kernel=True`.

For a Flax layer with `padding="VALID"`, PyTorch's layer has `padding=0`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.files.narrowing import as_jax
from nmjax.files.tensor_files import NOTE, write_tensors
from nmjax.files.torch_axes import Layouts
from nmjax.layouts import GivenAxes, Shape
from nmjax.packed.packing import unpack
from nmjax.packed.weight import is_packed
from nmjax.patterns.pattern import LeafPlan
from nmjax.plans import Plan
from nmjax.trees.leaves import map_named, named_leaves
from nmjax.trees.path_rules import PathRules, as_rules, first_match

_RENAMED = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
# Collections of Flax whose names are left out.
_COLLECTIONS = {"params", "batch_stats"}
# Entries of a PyTorch state dict that have no leaf in a JAX tree.
_COUNTERS = r"num_batches_tracked$"


def to_torch(
    params: Any,
    *,
    names: Callable[[str], str] | None = None,
    axes: Mapping[str, GivenAxes] | None = None,
    plan: Plan | None = None,
    transposed: PathRules | None = None,
    transpose_kernel: PathRules = (),
) -> dict[str, np.ndarray]:
    """Converts parameters to a PyTorch state dict of NumPy arrays.

    Args:
      params: parameters, and batch statistics if any. Packed leaves are unpacked.
      names: JAX name -> PyTorch name; by default those of the table above.
      axes: path rule -> axes of the leaves that match, where they are not certain.
      plan: where to find the axes of other leaves.
      transposed: path rules of transposed convolutions; `()` if there are none.
      transpose_kernel: path rules of those with `transpose_kernel=True`.

    Raises:
      ValueError: two leaves have the same PyTorch name; the layout of kernels is unknown, or they
        are stacks of layers (the message lists all such leaves); a path rule matches no leaf.

    >>> params = {"Conv_0": {"kernel": jnp.zeros((3, 3, 8, 16)), "bias": jnp.zeros(16)}}
    >>> {name: array.shape for name, array in to_torch(params).items()}
    {'Conv_0.bias': (16,), 'Conv_0.weight': (16, 8, 3, 3)}
    """
    known = {**(plan or {}), **_packed_plans(params)}
    # PyTorch has no packed weights in a state dict, so zeros are written out.
    leaves = named_leaves(unpack(params))
    layouts = Layouts(axes or {}, known, transposed, transpose_kernel)
    conversions = layouts.conversions({name: np.shape(leaf) for name, leaf in leaves.items()})
    state: dict[str, np.ndarray] = {}
    for name, entry in _torch_names(leaves, names).items():
        if entry in state:
            raise ValueError(f"{name} and another leaf would both become {entry!r}")
        tensor = conversions[name].to_torch(np.asarray(leaves[name]))
        # np.ascontiguousarray would give a scalar an axis.
        state[entry] = np.ascontiguousarray(tensor) if tensor.ndim else tensor
    return state


def from_torch(
    state: Mapping[str, Any],
    params: Any,
    *,
    names: Callable[[str], str] | None = None,
    ignore: PathRules = (),
    axes: Mapping[str, GivenAxes] | None = None,
    plan: Plan | None = None,
    transposed: PathRules | None = None,
    transpose_kernel: PathRules = (),
) -> Any:
    """Converts a PyTorch state dict to parameters.

    Args:
      state: PyTorch name -> array or detached tensor, as `state_dict()` returns them.
      params: a tree with the structure and shapes of the result: arrays or ShapeDtypeStructs.
      names: as in `to_torch`.
      ignore: path rules for entries that no leaf uses. Batch counters are always ignored.
      axes: as in `to_torch`.
      plan: as in `to_torch`.
      transposed: as in `to_torch`.
      transpose_kernel: as in `to_torch`.

    Returns:
      The tree with the arrays of the state, in the state's dtypes. Unless `jax_enable_x64` is on,
      64-bit integers become 32-bit ones if all of them fit.

    Raises:
      ValueError: leaves have no entry, or one of another shape (the message lists all such leaves);
        an entry has no leaf; the layout of kernels is unknown, as in `to_torch`; JAX would narrow
        an entry, such as one of float64.
    """
    leaves = named_leaves(params)
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    wanted = _torch_names(leaves, names)
    layouts = Layouts(axes or {}, plan or {}, transposed, transpose_kernel)
    found = _find(state, wanted, shapes, layouts)
    rules = (*as_rules(ignore), _COUNTERS)
    # An entry that nothing uses usually means a wrong name, so it is an error.
    left = [name for name in state.keys() - set(wanted.values()) if not first_match(rules, name)]
    if left:
        raise ValueError(
            f"no leaf uses these entries: {sorted(left)}. Map names to them (names=), or ignore "
            "them (ignore=)"
        )
    return map_named(lambda name, _: as_jax(f"the entry {wanted[name]}", found[name]), params)


def masks_from_torch(
    state: Mapping[str, Any],
    params: Any,
    plan: Plan,
    *,
    names: Callable[[str], str] | None = None,
    suffix: str = "_mask",
    axes: Mapping[str, GivenAxes] | None = None,
    transposed: PathRules | None = None,
    transpose_kernel: PathRules = (),
) -> dict[str, jax.Array]:
    """Converts masks from a PyTorch state dict, such as those of `torch.nn.utils.prune`.

    Args:
      state: PyTorch name -> tensor or array of zeros and ones, one for each planned leaf.
      params: a tree with the structure and shapes of the parameters.
      plan: from `nmjax.make_plan`.
      names: JAX name -> PyTorch name, without the suffix.
      suffix: follows the weight's name in the name of its mask.
      axes: as in `to_torch`.
      transposed: as in `to_torch`.
      transpose_kernel: as in `to_torch`.

    Returns:
      Leaf name -> boolean array, True = kept, for `nmjax.prune` and `nmjax.pack`.

    Raises:
      ValueError: a planned leaf has no mask, or its mask has another shape or other numbers than
        0 and 1; the layout of a planned leaf is unknown.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(params).items()}
    missing = sorted(plan.keys() - shapes.keys())
    if missing:
        raise ValueError(f"the plan names leaves that params does not have: {missing}")
    entries = _torch_names(shapes, names)
    wanted = {name: entries[name] + suffix for name in plan}
    layouts = Layouts(axes or {}, plan, transposed, transpose_kernel)
    found = _find(state, wanted, shapes, layouts)
    for name, mask in found.items():
        if not np.isin(mask, (0, 1)).all():
            raise ValueError(f"{wanted[name]} is not a mask: it has values other than 0 and 1")
    return {name: jnp.asarray(mask != 0) for name, mask in found.items()}


def save_torch(
    path: str | os.PathLike[str],
    params: Any,
    *,
    names: Callable[[str], str] | None = None,
    axes: Mapping[str, GivenAxes] | None = None,
    plan: Plan | None = None,
    transposed: PathRules | None = None,
    transpose_kernel: PathRules = (),
) -> None:
    """Writes dense weights, including zeros, to a safetensors file in PyTorch's names and layout.

    Any library that reads safetensors can load the file. The header stores the patterns of packed
    leaves under the key `"nmjax"`.

    Args:
      path: the file to write.
      params: parameters, packed or pruned.
      names: as in `to_torch`.
      axes: as in `to_torch`.
      plan: as in `to_torch`.
      transposed: as in `to_torch`.
      transpose_kernel: as in `to_torch`.

    Raises:
      ValueError: as in `to_torch`.
      ImportError: safetensors is not installed.
    """
    entries = _torch_names(named_leaves(params, is_leaf=is_packed), names)
    patterns = {
        entries[name]: str(leaf_plan.pattern) for name, leaf_plan in _packed_plans(params).items()
    }
    note = {"format": "dense", "version": 1, "patterns": patterns}
    state = to_torch(
        params,
        names=names,
        axes=axes,
        plan=plan,
        transposed=transposed,
        transpose_kernel=transpose_kernel,
    )
    write_tensors(path, state, {"format": "pt", NOTE: json.dumps(note)})


def torch_name(name: str) -> str:
    """Returns the PyTorch name of a leaf.

    >>> torch_name("encoder/Dense_0/kernel")
    'encoder.Dense_0.weight'
    """
    *path, leaf = name.split("/")
    return ".".join([*path, _RENAMED.get(leaf, leaf)])


def _torch_names(leaves: Iterable[str], names: Callable[[str], str] | None) -> dict[str, str]:
    """Leaf name -> PyTorch name."""
    if names is not None:
        return {name: _given_name(names, name) for name in leaves}
    leaves = list(leaves)
    tops = {name.partition("/")[0] for name in leaves}
    # A tree with other keys beside `params` is not one of Flax's collections.
    are_collections = "params" in tops and tops <= _COLLECTIONS and "params" not in leaves
    return {
        name: torch_name(name.partition("/")[2] if are_collections else name) for name in leaves
    }


def _given_name(names: Callable[[str], str], name: str) -> str:
    """The PyTorch name of a leaf by the user's function."""
    if not callable(names):
        raise TypeError(
            "names= must be a function from a leaf's name to its PyTorch name; got "
            f"{type(names).__name__}. For a dict, pass its __getitem__"
        )
    entry = names(name)
    if not isinstance(entry, str):
        raise TypeError(f"names= must give each leaf a text; for {name} it gave {entry!r}")
    return entry


def _packed_plans(params: Any) -> dict[str, LeafPlan]:
    leaves = named_leaves(params, is_leaf=is_packed)
    return {name: leaf.leaf_plan for name, leaf in leaves.items() if is_packed(leaf)}


def _find(
    state: Mapping[str, Any],
    wanted: Mapping[str, str],
    shapes: Mapping[str, Shape],
    layouts: Layouts,
) -> dict[str, np.ndarray]:
    """Leaf name -> its entry, in JAX's axes."""
    conversions = layouts.conversions(shapes, wanted)
    found: dict[str, np.ndarray] = {}
    complaints = []
    for name, entry in wanted.items():
        shape, conversion = shapes[name], conversions[name]
        expected = conversion.torch_shape(shape)
        if entry not in state:
            complaints.append(f"  {name}: no entry {entry!r}")
        elif tuple(state[entry].shape) != expected:
            complaints.append(
                f"  {name} of shape {shape}: {entry!r} should have shape {expected}, "
                f"got {tuple(state[entry].shape)}"
            )
        else:
            found[name] = conversion.from_torch(_as_numpy(state[entry]), shape)
    if complaints:
        raise ValueError("the state dict does not match:\n" + "\n".join(complaints))
    return found


def _as_numpy(x: Any) -> np.ndarray:
    """Copies an array or a tensor."""
    if isinstance(x, np.ndarray | jax.Array) or not hasattr(x, "__dlpack__"):
        return np.array(x)
    x = x.contiguous() if hasattr(x, "contiguous") else x
    try:
        return np.array(np.from_dlpack(x))
    except (BufferError, RuntimeError):
        # NumPy cannot read PyTorch's bfloat16. JAX can, but narrows 64-bit numbers.
        return np.array(jnp.from_dlpack(x))
