"""How a run is spread over devices and processes: what each holds and reads."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

import nmjax
from experiments.distributed.layout import Layout, Preset, make_layout, parse_mesh
from experiments.distributed.seeds import OverSeeds, fastest
from experiments.tasks.task import Batch, Rows


class Placement(NamedTuple):
    """Where a run's arrays go.

    Attributes:
      over_seeds: for `make_programs`; None for a single seed.
      layout: over a mesh; None for one device.
    """

    over_seeds: OverSeeds | None = None
    layout: Layout | None = None

    def rows_of(self, examples: int) -> Rows:
        """Returns the rows that this process needs of a batch with this many examples.

        If the devices do not split it evenly, the last rows are past its end, for padding.
        """
        if self.layout is None:
            return np.arange(examples)
        # Rounded up: every shard has the same number of rows.
        each = -(-examples // self.layout.batch_shards)
        first = each * np.array(self.layout.own_batch_shards)
        return (first[:, None] + np.arange(each)).ravel()

    def put(self, batch: Batch) -> Any:
        """Places a batch. `batch` holds only the rows that this process needs."""
        if self.layout is None:
            return batch
        layout, axis, own = self.layout, self._axis, self.layout.own_batch_shards

        def put(rows: np.ndarray) -> jax.Array:
            each = rows.shape[axis] // len(own)
            shape = (*rows.shape[:axis], each * layout.batch_shards, *rows.shape[axis + 1 :])

            def shard(index: Any) -> np.ndarray:
                # `index` is of the whole batch, and `rows` only has this process's parts, one after
                # the other. An axis that is not split has the start None.
                start = each * own.index((index[axis].start or 0) // each)
                part: np.ndarray = rows[(*index[:axis], slice(start, start + each))]
                return part

            return jax.make_array_from_callback(shape, layout.batch_sharding(axis), shard)

        return {name: put(rows) for name, rows in batch.items()}

    def like(self, shapes: Any) -> Any:
        """Adds to a tree of shapes the shardings that arrays of a training state have here."""
        return shapes if self.layout is None else self.layout.place_like(shapes)

    def told(self, params: Any, plan: nmjax.Plan) -> nmjax.Plan:
        """The plan that knows how parameters lie here, for the masks of TPUs."""
        if self.layout is None:
            return plan
        return nmjax.shard_plan(params, plan, _by_leaf(self.layout, params))

    def active(self) -> AbstractContextManager[Any]:
        """Makes the mesh JAX's current one, which Explicit axes need."""
        return nullcontext() if self.layout is None else jax.set_mesh(self.layout.mesh)

    @property
    def _axis(self) -> int:
        """The axis of the examples in a batch; several seeds have an axis before it."""
        return 0 if self.over_seeds is None else 1


# Everything on JAX's default device.
HERE = Placement()


def make_placement(
    params: Any,
    plan: nmjax.Plan,
    *,
    seeds: int = 1,
    batch_size: int,
    devices: int | None = None,
    mesh: str | None = None,
    axis_type: AxisType = AxisType.Auto,
    preset: Preset = "data",
    rules: tuple[str, ...] = (),
    batch_axes: tuple[str, ...] = (),
    accumulate: int = 1,
) -> Placement:
    """Decides where a run goes.

    Each batch is split over the mesh. The compiler adds the one sum of gradients that this needs,
    so the sparse-refined term is still added once. Batch statistics cover the whole batch.

    Args:
      params: a tree of shapes, of one seed.
      plan: of these parameters.
      seeds: how many train together.
      batch_size: examples a step, over all devices and processes.
      devices: how many, instead of a mesh; None for all accelerators, or one CPU. N devices make
        the mesh "data=N".
      mesh: such as "data=4,model=2".
      axis_type: of the mesh's axes.
      preset: of the layout, see `make_layout`.
      rules: of the layout.
      batch_axes: mesh axes that split each batch; by default the first.
      accumulate: parts of a batch that a step takes one after the other.

    Raises:
      ValueError: there are too few devices, they do not split the batch, shards cut groups or
        blocks, or a rule does not fit.
    """
    over_seeds = jax.vmap if seeds > 1 else None
    made = _mesh(devices, mesh, axis_type)
    if batch_size % accumulate:
        raise ValueError(f"a batch of {batch_size} does not split evenly into {accumulate} parts")
    if made is None:
        if rules or batch_axes or preset != "data":
            raise ValueError("a layout needs devices to split parameters over: give a --mesh")
        return Placement(fastest(seeds) if seeds > 1 else None)
    if seeds > 1 and axis_type == AxisType.Explicit:
        raise ValueError("several seeds train together on Auto axes only: drop --axis-types")
    layout = make_layout(made, params, preset=preset, rules=rules, batch_axes=batch_axes)
    shards = layout.batch_shards
    if batch_size // accumulate % shards:
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        axes = " and ".join(f"{axis}={made.shape[axis]}" for axis in layout.batch_axes)
        raise ValueError(
            f"a batch of {batch_size}{parts} does not split evenly over {shards} devices, which "
            f"the mesh has along {axes}: give a --batch-size that {shards * accumulate} divides, "
            "or other --batch-axes"
        )
    nmjax.check_sharding(params, plan, _by_leaf(layout, params))
    # `jax.vmap` even on a CPU: the devices are taken by the mesh, not by the seeds.
    return Placement(over_seeds, layout)


def _mesh(devices: int | None, mesh: str | None, axis_type: AxisType) -> Mesh | None:
    if mesh is not None:
        if devices is not None:
            raise ValueError(f"--mesh {mesh} sets the number of devices: drop --devices {devices}")
        return parse_mesh(mesh, axis_type)
    present = jax.device_count()
    if devices is None:
        # CPU devices are simulated: they share the cores that one device would use as well.
        alone = jax.default_backend() == "cpu" and jax.process_count() == 1
        devices = 1 if alone else present
    if not 1 <= devices <= present:
        raise ValueError(f"devices must be from 1 to {present}, got {devices}")
    if devices < present and jax.process_count() > 1:
        raise ValueError(f"several processes need all of their {present} devices, got {devices}")
    if devices == 1:
        return None
    return jax.make_mesh((devices,), ("data",), (axis_type,), devices=jax.devices()[:devices])


def _by_leaf(layout: Layout, params: Any) -> Mapping[str, Any]:
    shardings: Mapping[str, Any] = jax.tree.map(
        lambda leaf: leaf.sharding, layout.place_like(params)
    )
    return shardings
