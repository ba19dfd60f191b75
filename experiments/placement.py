"""Where states and batches lie: one device, or copies of the state and a share of each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.seeds import OverSeeds, fastest
from experiments.tasks.task import Batch


class Placement(NamedTuple):
    """How a run is spread over devices.

    Attributes:
      over_seeds: for `make_programs`; None for a single seed.
      put_state: places a `RunState`.
      put_batch: places a host batch.
    """

    over_seeds: OverSeeds | None
    put_state: Callable[[Any], Any]
    put_batch: Callable[[Batch], Any]


def make_placement(devices: int | None, seeds: int, batch_size: int) -> Placement:
    """Decides where a run goes.

    With several devices, each holds the whole state and an equal share of every batch (data
    parallelism); the compiler adds the one sum of gradients that this needs, so the
    sparse-refined term is still added once. Batch statistics are those of the whole batch.

    Args:
      devices: how many; None for all accelerators, or one CPU.
      seeds: trained together.
      batch_size: examples a step, over all devices.

    Raises:
      ValueError: if there are not as many devices, or they do not divide the batch.
    """
    present = len(jax.devices())
    if devices is None:
        devices = 1 if jax.default_backend() == "cpu" else present
    if not 1 <= devices <= present:
        raise ValueError(f"devices must be from 1 to the {present} there are, got {devices}")
    if batch_size % devices:
        raise ValueError(f"a batch of {batch_size} does not split evenly over {devices} devices")
    if devices == 1:
        return Placement(fastest(seeds) if seeds > 1 else None, _as_it_is, _as_it_is)
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    whole = NamedSharding(mesh, PartitionSpec())
    # Behind the axis of seeds, where there is one.
    axis = 1 if seeds > 1 else 0
    shared = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))

    def put_batch(batch: Batch) -> Any:
        # Evaluation batches may be of any size; one that does not split is copied to all.
        splits = all(values.shape[axis] % devices == 0 for values in batch.values())
        return jax.device_put(batch, shared if splits else whole)

    return Placement(
        jax.vmap if seeds > 1 else None, lambda state: jax.device_put(state, whole), put_batch
    )


def _as_it_is(tree: Any) -> Any:
    return tree
