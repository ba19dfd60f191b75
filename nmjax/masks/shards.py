"""Whether the shards of an array hold whole groups and blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax


def holds_whole(sizes: Sequence[int], shards: Sequence[int], m: int) -> bool:
    """Whether no shard boundary falls inside one of the runs of m that axes are cut into.

    The boundaries of an axis lie, in the flattened axes, at every multiple of one shard's length
    times the sizes of the axes behind it; m has to divide that.

    Args:
      sizes: of the axes that are taken together, the last one varying fastest.
      shards: into how many parts each is split.
      m: how many consecutive entries belong together.

    >>> holds_whole([8], [2], 4), holds_whole([12], [2], 4)
    (True, False)
    >>> holds_whole([2, 6], [1, 2], 4)  # The first group is all but two of the first six.
    False
    """
    return all(
        count == 1 or size // count * math.prod(sizes[j + 1 :]) % m == 0
        for j, (size, count) in enumerate(zip(sizes, shards, strict=True))
    )


def check_shards(w: jax.Array, m: int, axes: tuple[int, ...], what: str) -> None:
    """Raises if explicit sharding cuts into m; automatic sharding is the compiler's business.

    Args:
      w: weights.
      m: how many consecutive weights belong together.
      axes: non-negative axes along which they follow each other, the last one fastest.
      what: what would be cut, for the message.

    Raises:
      ValueError: in a mesh with explicit axes, a shard of `w` holds part of one.
    """
    sharding = jax.typeof(w).sharding
    shards = [
        math.prod(sharding.mesh.shape[name] for name in mesh_axes(sharding.spec[a])) for a in axes
    ]
    if not holds_whole([w.shape[a] for a in axes], shards, m):
        raise ValueError(
            f"{what} of {jax.typeof(w)} reach across shards; shard other "
            f"axes, or let every shard hold a multiple of {m}, or use jax.reshard first"
        )


def mesh_axes(partition: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes that one entry of a PartitionSpec names."""
    return (partition,) if isinstance(partition, str) else tuple(partition or ())
