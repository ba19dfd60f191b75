"""Masks compiled for an H100 that is not there: kernels, bytes and temporaries.

The compiler is that of JAX's plugin for CUDA. It needs no driver and no NVIDIA library, only the
numbers below, `ptxas` on the PATH, and no trial runs to choose among algorithms.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from experiments.benchmarks.aot import masks
from experiments.benchmarks.aot.rows import Row
from experiments.benchmarks.aot.statistics import NAME, shape_bytes, statistics

# What XLA asks a device about itself. The figures are those of the H100 SXM with 80 GB.
H100 = """
gpu_device_info {
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Instructions of a program that start a kernel.
KERNEL = re.compile(r" (?:fusion|copy|transpose|reduce|sort|custom-call)\(")


@cache
def devices(topology: str = "1x1x1") -> list[Any]:
    """H100s; the topology is slices x hosts x GPUs of a host.

    Raises:
      NotImplementedError: JAX's plugin for CUDA is not installed.
    """
    # Without a GPU there is nothing to try algorithms on.
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=topology)
    except (RuntimeError, ValueError, KeyError) as error:
        raise NotImplementedError(f"JAX's plugin for CUDA is missing: {error}") from error
    return list(found.devices)


def rows() -> Iterator[Row]:
    """Kernels, bytes over one read and one write, and temporaries of nmjax's masks."""
    for settings in product(masks.PATTERNS, masks.DTYPES, masks.AXES, ("apply", "mask")):
        yield Row("/".join(map(str, ("gpu", "h100", *settings))), partial(_row, *settings))


def _row(pattern: str, dtype: str, axis: int, what: str) -> dict[str, Any]:
    function = masks.program(what, masks.MASKS["nmjax"], pattern, axis)
    place = SingleDeviceSharding(devices()[0])
    shape = jax.ShapeDtypeStruct(masks.SHAPE, dtype, sharding=place)
    compiled = jax.jit(function).lower(shape).compile()
    kernels, size = launches(compiled.as_text() or "")
    return {
        "kernels": kernels,
        "bytes_over_least": size / masks.least_bytes(what, dtype),
        "temporaries_MiB": statistics(compiled)["temporaries"] / 2**20,
    }


def launches(text: str) -> tuple[int, int]:
    """Kernels that a program without loops starts, and the bytes of what they read and write."""
    entry = text[text.index("ENTRY ") :].splitlines()
    shapes = {found[1]: line for line in entry if (found := NAME.search(line))}
    kernels = [line for line in entry if KERNEL.search(line)]
    total = 0
    for line in kernels:
        result, operands = KERNEL.split(line, maxsplit=1)
        total += shape_bytes(result)
        names = re.findall(r"%([\w.\-]+)", operands.partition(")")[0])
        total += sum(shape_bytes(_result(shapes[name])) for name in names)
    return len(kernels), total


def _result(line: str) -> str:
    return re.split(r" [\w\-]+\(", line.partition(" = ")[2], maxsplit=1)[0]
