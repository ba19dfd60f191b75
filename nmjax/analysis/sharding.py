"""Whether a plan's groups and blocks lie whole on the devices of a mesh, asked before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from nmjax.masks.shards import holds_whole, mesh_axes
from nmjax.patterns.pattern import LeafPlan
from nmjax.plans import Plan
from nmjax.pruning import planned_leaves
from nmjax.trees.leaves import named_leaves

Shape = tuple[int, ...]

# Of the numbers of shards that would do, a message names the smallest.
_MOST_COUNTS = 8


def check_sharding(
    params: Any,
    plan: Plan,
    shardings: Any = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> None:
    """Raises if shards cut groups or blocks, so that masks would need communication.

    A mask of N:M costs no communication as long as every shard holds whole groups. Blocks compete
    as well: those of one row over all inputs, those of `"1xN@S/layer"` over the whole layer; what
    competes must lie in one shard. Call it before training starts.

    Args:
      params: arrays, or anything with their tree, shapes and dtypes (`jax.eval_shape`).
      plan: from `nmjax.make_plan`.
      shardings: shardings or PartitionSpecs, in a tree like `params` or a prefix of it: one for
        a subtree or for everything. By default those that the leaves of `params` have. It does
        not matter whether mesh axes are Auto or Explicit. `UNCONSTRAINED` counts as not split.
      mesh: of the PartitionSpecs; by default the one that `jax.set_mesh` set.

    Raises:
      ValueError: a planned leaf is cut, or split unevenly: all such leaves are named, with the
        axis, the mesh axis and what to change; `params` do not fit the plan; a leaf without
        sharding; a PartitionSpec without a mesh.
      TypeError: a sharding is none.

    >>> import jax.numpy as jnp
    >>> import nmjax
    >>> params = {"kernel": jax.ShapeDtypeStruct((12, 8), jnp.float32)}
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> mesh = AbstractMesh((2,), ("model",))
    >>> check_sharding(params, plan, PartitionSpec(None, "model"), mesh=mesh)
    >>> check_sharding(params, plan, PartitionSpec("model"), mesh=mesh)
    Traceback (most recent call last):
        ...
    ValueError: shards cut what masks have to see whole:
      kernel (12, 8): mesh axis 'model' splits axis -2 into 2 shards of 6, which cuts groups of 4;
        3 shards would not, nor does splitting axis -1
    Without that, every step would gather these weights to find their masks.
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
            "shards cut what masks have to see whole:\n"
            + "\n".join(complaints)
            + "\nWithout that, every step would gather these weights to find their masks."
        )


def _complaints(shape: Shape, leaf: LeafPlan, sharding: Sharding) -> Iterator[str]:
    try:
        held = sharding.shard_shape(shape)
    except (ValueError, IndexError) as error:  # It does not divide an axis, or names too many.
        yield f"it cannot be split so: {error}"
        return
    shards = [size // max(part, 1) for size, part in zip(shape, held, strict=True)]
    wholes = leaf.pattern.wholes(shape, leaf.axes)
    busy = {axis for whole in wholes for axis in whole.axes}
    free = [axis for axis in range(-len(shape), 0) if axis not in busy and shape[axis] > 1]
    for axes, length, what in wholes:
        sizes = [shape[axis] for axis in axes]
        for j, axis in enumerate(axes):
            alone = [shards[axis] if i == j else 1 for i in range(len(axes))]
            if not holds_whole(sizes, alone, length):
                yield (
                    f"{_splitter(sharding, axis, len(shape))} axis {axis} into "
                    f"{shards[axis]} shards of {held[axis]}, which cuts {what};\n"
                    f"    {_cure(sizes, j, length, free)}"
                )


def _splitter(sharding: Sharding, axis: int, ndim: int) -> str:
    """Who splits an axis, with the verb."""
    if not isinstance(sharding, NamedSharding):
        return "the sharding splits"
    spec = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    names = [name for name in mesh_axes(spec[axis]) if sharding.mesh.shape[name] > 1]
    listed = ", ".join(map(repr, names))
    return f"mesh axis {listed} splits" if len(names) == 1 else f"mesh axes {listed} split"


def _cure(sizes: list[int], j: int, length: int, free: list[int]) -> str:
    """What would not cut runs of `length` along these axes, where the j-th is cut now."""
    fitting = [
        count
        for count in range(2, sizes[j] + 1)
        if sizes[j] % count == 0
        and holds_whole(sizes, [count if i == j else 1 for i in range(len(sizes))], length)
    ]
    others = f"splitting axis {' or '.join(map(str, free))}" if free else ""
    if not fitting:
        return f"leave that axis whole{' and try ' + others if others else ''}"
    counts = " or ".join(map(str, fitting[:_MOST_COUNTS]))
    return f"{counts} shards would not{', nor does ' + others if others else ''}"


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
            f"no sharding is known of {', '.join(missing)}; give one for each planned leaf, in a "
            "tree like the parameters or a prefix of it, or pass arrays that have shardings"
        )
    return {name: _as_sharding(name, sharding, mesh) for name, sharding in found.items()}


def _node_above(nodes: dict[str, Any], name: str) -> Any:
    """The entry for a leaf, or for a subtree that it lies in."""
    parts = name.split("/")
    names = ("/".join(parts[:count]) for count in range(len(parts), -1, -1))
    return next((nodes[above] for above in names if above in nodes), None)


def _as_sharding(name: str, sharding: Any, mesh: Any) -> Sharding:
    if isinstance(sharding, Sharding):
        return sharding
    if not isinstance(sharding, PartitionSpec):
        raise TypeError(f"{name}: expected a sharding or a PartitionSpec, got {sharding!r}")
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ValueError(
            f"{name}: {sharding} says nothing without a mesh; pass mesh=, or use jax.set_mesh"
        )
    return NamedSharding(mesh, sharding)
