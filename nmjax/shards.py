"""Whether the shards of an array hold whole groups and blocks."""

from __future__ import annotations

import math

import jax


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
        math.prod(sharding.mesh.shape[name] for name in _names(sharding.spec[a])) for a in axes
    ]
    size = math.prod(w.shape[a] for a in axes)
    if any(count > 1 for count in shards[1:]) or size // shards[0] % m:
        raise ValueError(
            f"{what} of {jax.typeof(w)} reach across shards; shard other "
            f"axes, or let every shard hold a multiple of {m}, or use jax.reshard first"
        )


def _names(partition: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes that one entry of a PartitionSpec names."""
    return (partition,) if isinstance(partition, str) else tuple(partition or ())
