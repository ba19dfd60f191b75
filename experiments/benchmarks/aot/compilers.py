"""Devices that are not there: topologies for which the real compilers compile.

`set_up` comes before the first use of JAX in a process.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

# The smallest topology of each generation.
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def set_up(dump: Path | None = None) -> None:
    """Prepares the compilers; with `dump`, that for TPUs writes schedules there (see `bundles`)."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Otherwise libtpu asks the network which machine it is on, and complains.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # No chip is used, so several processes may compile at a time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # The plugin for CUDA looks for NVIDIA's libraries; compiling needs none.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"


@cache  # The devices of two topologies are not the same, even if the topologies are.
def tpu_devices(topology: str) -> list[Any]:
    """Devices of a chip of `CHIPS` or of a topology such as "v5p:4x4x4"."""
    name = CHIPS.get(topology, topology)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def on_chip(chip: str, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A shape that lies on one device of a chip: `jax.jit(f).lower(shape).compile()`."""
    sharding = SingleDeviceSharding(tpu_devices(chip)[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def tpu_mesh(topology: str, **axes: int) -> Mesh:
    """A mesh over all devices of a topology, such as `tpu_mesh("v5p:4x4x4", data=8, model=8)`."""
    devices = np.array(tpu_devices(topology)).reshape(*axes.values())
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
