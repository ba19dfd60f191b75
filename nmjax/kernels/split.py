"""Tells the compiler how to split a compiled kernel over the automatic axes of a mesh.

The compiler knows nothing about a kernel, so on its own it gathers all operands on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def split(
    kernel: Callable[..., jax.Array],
    *operands: jax.Array,
    rule: str,
    whole: str = "",
    steps: Mapping[str, int] | None = None,
) -> jax.Array:
    """Calls `kernel(*operands)`; each device computes the part that it has the operands for.

    Inside `jax.shard_map`, and on explicit axes of a mesh, the kernel is called directly.

    Args:
      kernel: computes a part of the result from parts of the operands. The program keeps it, so
        it must not close over arrays: inside `jax.jit` they would be leaked tracers.
      *operands: arrays.
      rule: names of all axes, as in `"b i, i o -> b o"`. Axes with the same name are split alike;
        axes that the result lacks are whole on every device.
      whole: names of more axes that are whole.
      steps: name -> what the size of a part must be a multiple of. An axis without such parts is
        whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # One device has nothing to split, and without custom_partitioning eager calls are faster.
    if mesh.manual_axes or mesh.explicit_axes or (mesh.empty and jax.device_count() == 1):
        return kernel(*operands)
    given, _, made = rule.partition("->")
    inputs, output = [part.split() for part in given.split(",")], made.split()
    named = dict.fromkeys(name for names in (*inputs, output) for name in names)
    never = tuple(name for name in named if name not in output or name in whole.split())

    def partition(mesh: Mesh, arguments: Any, result: Any) -> tuple[Any, ...]:
        del arguments
        spec: tuple[Any, ...] = (None,) * len(output)
        if mesh.empty:  # No operand lies on a mesh, so everything is whole.
            mesh = Mesh(np.array(list(result.sharding.device_set)), ("devices",))
        else:
            spec = (*result.sharding.spec, *spec)
        axes = {
            name: entry
            for name, entry, size in zip(output, spec, result.shape, strict=False)
            if name not in never and size % ((steps or {}).get(name, 1) * _parts(mesh, entry)) == 0
        }

        def place(names: list[str]) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*[axes.get(name) for name in names]))

        return mesh, kernel, place(output), tuple(map(place, inputs))

    call = custom_partitioning(kernel)
    call.def_partition(partition, sharding_rule=rule, need_replication_factors=never)
    y: jax.Array = call(*operands)
    return y


def _parts(mesh: Mesh, entry: Any) -> int:
    """Number of parts that an entry of a PartitionSpec splits an axis into."""
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return math.prod(mesh.shape[name] for name in names)
