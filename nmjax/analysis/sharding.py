"""Shards and plans: checks that no group or block is cut, and plans that know how weights lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from nmjax.masks.shards import holds_whole, mesh_axes
from nmjax.patterns.pattern import LeafPlan
from nmjax.plans import Plan
from nmjax.pruning import planned_leaves
from nmjax.trees.leaves import named_leaves

Shape = tuple[int, ...]

# Messages suggest at most this many shard counts, the smallest ones.
_MOST_COUNTS = 8


def check_sharding(
    params: Any,
    plan: Plan,
    shardings: Any = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> None:
    """Raises if shards cut groups or blocks, because masks would then need communication.

    N:M masks need no communication if every shard has whole groups. 1xN blocks compete with each
    other: within a row over all inputs, or with `"1xN@S/layer"` within the whole layer. Blocks
    that compete must be in one shard. Call this function before training starts.

    Args:
      params: arrays, or anything with their tree, shapes and dtypes (`jax.eval_shape`).
      plan: from `nmjax.make_plan`.
      shardings: shardings or PartitionSpecs, in a tree like `params` or a prefix of it: one may
        stand for a subtree or for everything. By default, the shardings of the leaves of `params`.
        Mesh axes may be Auto or Explicit. `UNCONSTRAINED` counts as not split.
      mesh: the mesh of the PartitionSpecs; by default the one from `jax.set_mesh`.

    Raises:
      ValueError: shards cut planned leaves or split them unevenly (the message lists all such
        leaves, with the axis, the mesh axis and what to change); `params` do not fit the plan; a
        leaf has no sharding; a PartitionSpec has no mesh.
      TypeError: `shardings` contains something else.

    >>> import jax.numpy as jnp
    >>> import nmjax
    >>> params = {"kernel": jax.ShapeDtypeStruct((12, 8), jnp.float32)}
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> mesh = AbstractMesh((2,), ("model",))
    >>> check_sharding(params, plan, PartitionSpec(None, "model"), mesh=mesh)
    >>> check_sharding(params, plan, PartitionSpec("model"), mesh=mesh)
    Traceback (most recent call last):
        ...
    ValueError: the sharding cuts groups or blocks:
      kernel (12, 8): mesh axis 'model' splits axis -2 into 2 shards of 6, which cuts groups of 4;
        use 3 shards, or split axis -1
    With this sharding, every step would gather these weights to compute their masks.
    """
    leaves = planned_leaves(params, plan)
    chosen = _shardings(leaves, shardings, mesh)
    complaints = [
        f"  {name} {leaf.shape}: {complaint}"
        for name, leaf in leaves.items()
        for complaint in _complaints(tuple(leaf.shape), plan[name], chosen[name])
    ]
    if complaints:
        raise ValueError(
            "the sharding cuts groups or blocks:\n"
            + "\n".join(complaints)
            + "\nWith this sharding, every step would gather these weights to compute their masks."
        )


def shard_plan(
    params: Any,
    plan: Plan,
    shardings: Any = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> Plan:
    """The plan for parameters that lie like this on a mesh with automatic axes.

    On TPUs, XLA cannot partition the kernel that computes masks, and with automatic axes a program
    does not show how its parameters lie. With this plan, `sparsify`, `add_sparse_refined` and all
    else that computes masks by magnitude run the kernel on every shard, without communication.
    Programs for other platforms stay as they are, and so do programs on one device, in
    `jax.shard_map`, or with explicit axes, which need no such plan.

    Use the plan where the parameters lie like this: elsewhere on the same mesh, a program for TPUs
    first moves them.

    Args:
      params: arrays, or anything with their tree, shapes and dtypes (`jax.eval_shape`). Leaves may
        have additional leading axes, such as that of the layers in a stack.
      plan: from `nmjax.make_plan`.
      shardings: as in `check_sharding`.
      mesh: as in `check_sharding`.

    Returns:
      The plan with the shardings of its leaves. A leaf stays as it is if its sharding is no
      `NamedSharding`, has explicit axes, or is `UNCONSTRAINED` in part.

    Raises:
      ValueError, TypeError: as `check_sharding`.

    >>> import jax.numpy as jnp
    >>> import nmjax
    >>> params = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    >>> mesh = AbstractMesh((2,), ("model",))
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> shard_plan(params, plan, PartitionSpec(None, "model"), mesh=mesh)["kernel"].sharding.spec
    P(None, 'model')
    """
    check_sharding(params, plan, shardings, mesh=mesh)
    leaves = planned_leaves(params, plan)
    chosen = _shardings(leaves, shardings, mesh)

    def placed(name: str, leaf: Any) -> Any:
        if name not in leaves:
            return leaf
        return dataclasses.replace(leaf, sharding=_on_automatic_axes(chosen[name], leaves[name]))

    return dataclasses.replace(
        plan, leaves=tuple((name, placed(name, leaf)) for name, leaf in plan.leaves)
    )


def _on_automatic_axes(sharding: Sharding, leaf: Any) -> NamedSharding | None:
    """The sharding with an entry for each axis and without devices, or None."""
    if not isinstance(sharding, NamedSharding) or PartitionSpec.UNCONSTRAINED in sharding.spec:
        return None
    mesh = sharding.mesh.abstract_mesh
    if set(mesh.axis_types) != {AxisType.Auto}:
        return None
    missing = (None,) * (len(leaf.shape) - len(sharding.spec))
    return NamedSharding(mesh, PartitionSpec(*sharding.spec, *missing))


def _complaints(shape: Shape, leaf: LeafPlan, sharding: Sharding) -> Iterator[str]:
    try:
        held = sharding.shard_shape(shape)
    except (ValueError, IndexError) as error:  # It does not divide an axis, or names too many.
        yield f"it cannot be split this way: {error}"
        return
    shards = [size // max(part, 1) for size, part in zip(shape, held, strict=True)]
    wholes = leaf.pattern.wholes(shape, leaf.axes)
    busy = {axis for whole in wholes for axis in whole.axes}
    # No group or block runs along these, so they can be split anywhere.
    free = [axis for axis in range(-len(shape), 0) if axis not in busy and shape[axis] > 1]
    for axes, length, what in wholes:
        sizes = [shape[axis] for axis in axes]
        for j, axis in enumerate(axes):
            # One axis at a time, so that the message names the axis that cuts.
            alone = [shards[axis] if i == j else 1 for i in range(len(axes))]
            if not holds_whole(sizes, alone, length):
                yield (
                    f"{_splitter(sharding, axis, len(shape))} axis {axis} into "
                    f"{shards[axis]} shards of {held[axis]}, which cuts {what};\n"
                    f"    {_cure(sizes, j, length, free)}"
                )


def _splitter(sharding: Sharding, axis: int, ndim: int) -> str:
    """Names what splits an axis, with its verb: "mesh axis 'data' splits"."""
    if not isinstance(sharding, NamedSharding):
        return "the sharding splits"
    spec = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    # Mesh axes of size 1 appear in specs but split nothing.
    names = [name for name in mesh_axes(spec[axis]) if sharding.mesh.shape[name] > 1]
    listed = ", ".join(map(repr, names))
    return f"mesh axis {listed} splits" if len(names) == 1 else f"mesh axes {listed} split"


def _cure(sizes: list[int], j: int, length: int, free: list[int]) -> str:
    """Advice: what would not cut runs of `length` along these axes, now that the j-th is cut."""
    fitting = [
        count
        for count in range(2, sizes[j] + 1)
        if sizes[j] % count == 0
        and holds_whole(sizes, [count if i == j else 1 for i in range(len(sizes))], length)
    ]
    advice = []
    if fitting:
        advice.append(f"use {' or '.join(map(str, fitting[:_MOST_COUNTS]))} shards")
    if free:
        advice.append(f"split axis {' or '.join(map(str, free))}")
    return ", or ".join(advice) or "do not split that axis"


def _shardings(leaves: dict[str, Any], given: Any, mesh: Any) -> dict[str, Sharding]:
    """The sharding of each leaf, by name."""
    if given is None:
        found = {name: getattr(leaf, "sharding", None) for name, leaf in leaves.items()}
    else:
        nodes = named_leaves(given, is_leaf=lambda x: isinstance(x, PartitionSpec | None))
        found = {name: _node_above(nodes, name) for name in leaves}
    missing = [name for name, sharding in found.items() if sharding is None]
    if missing:
        raise ValueError(
            f"no sharding for {', '.join(missing)}; pass one for each planned leaf, in a tree like "
            "the parameters or a prefix of it, or pass arrays that have shardings"
        )
    return {name: _as_sharding(name, sharding, mesh) for name, sharding in found.items()}


def _node_above(nodes: dict[str, Any], name: str) -> Any:
    """The entry for a leaf, or for a subtree that contains it."""
    # From the leaf itself up to the root, whose name is empty.
    parts = name.split("/")
    names = ("/".join(parts[:count]) for count in range(len(parts), -1, -1))
    return next((nodes[above] for above in names if above in nodes), None)


def _as_sharding(name: str, sharding: Any, mesh: Any) -> Sharding:
    if isinstance(sharding, Sharding):
        return sharding
    if not isinstance(sharding, PartitionSpec):
        raise TypeError(f"{name}: expected a sharding or a PartitionSpec, got {sharding!r}")
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh= must be a Mesh or an AbstractMesh, got {type(mesh).__name__}")
    if mesh.empty:
        raise ValueError(f"{name}: {sharding} needs a mesh; pass mesh=, or use jax.set_mesh")
    return NamedSharding(mesh, sharding)
