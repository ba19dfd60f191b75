"""Checks that the shards of an array hold whole groups and blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax


def holds_whole(sizes: Sequence[int], shards: Sequence[int], m: int) -> bool:
    """Whether every shard holds whole runs of m consecutive entries of the flattened axes.

    In the flattened axes, the shards of one axis meet at the multiples of (shard length) x (product
    of the later axes' sizes). No boundary cuts a run if m divides that product.

    Args:
      sizes: sizes of the axes, in the order in which they are flattened; the last varies fastest.
      shards: number of shards along each axis.
      m: length of a run.

    >>> holds_whole([8], [2], 4), holds_whole([12], [2], 4)
    (True, False)
    >>> holds_whole([2, 6], [1, 2], 4)  # A boundary after three entries cuts the first run.
    False
    """
    return all(
        count == 1 or size // count * math.prod(sizes[j + 1 :]) % m == 0
        for j, (size, count) in enumerate(zip(sizes, shards, strict=True))
    )


def check_shards(w: jax.Array, m: int, axes: tuple[int, ...], what: str) -> None:
    """Raises ValueError if a shard along an explicit mesh axis holds part of a run of m weights.

    Args:
      w: weights.
      m: length of a run.
      axes: non-negative axes along which runs extend, in the order in which they are flattened.
      what: what a run is, for the error message.
    """
    # The type shows explicit mesh axes only. With automatic axes the compiler inserts whatever
    # communication a cut run needs; `nmjax.check_sharding` reports it.
    sharding = jax.typeof(w).sharding
    shards = [
        math.prod(sharding.mesh.shape[name] for name in mesh_axes(sharding.spec[a])) for a in axes
    ]
    if not holds_whole([w.shape[a] for a in axes], shards, m):
        raise ValueError(
            f"{what} of {jax.typeof(w)} cross shard boundaries; shard other axes, give every "
            f"shard a multiple of {m}, or call jax.reshard first"
        )


def mesh_axes(partition: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return (partition,) if isinstance(partition, str) else tuple(partition or ())
