"""What NVIDIA's compiler reports of the decode kernel for an H100: registers, spills, occupancy."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from experiments.benchmarks.aot.rows import Row
from nmjax.kernels import build

VALUES = {"bf16": ("Bf16", "t"), "f16": ("F16", "t"), "int8": ("Bf16", "a")}
OUTPUTS, ROWS = (2, 4, 8), (8, 16, 32, 64)
# Of a multiprocessor: registers, threads, bytes of shared memory, blocks. A block takes 1 KiB of
# shared memory for the system, and a warp's registers are allocated 256 at a time.
REGISTERS, THREADS, SHARED, BLOCKS = 65536, 2048, 233472, 32
SYSTEM_SHARED, UNIT = 1024, 256

# A kernel's mangled name says its template's arguments: numbers, outputs of a thread, tiles of 8
# rows, warps of a block, and the type of the packed values.
ENTRY = re.compile(
    r"entry function '\S*?\d(Bf16|F16)ELi(\d+)ELi(\d+)ELi(\d+)E(t|a)E\S*'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers.*?(\d+) bytes smem",
    re.DOTALL,
)


def rows() -> Iterator[Row]:
    """A row for each variant of the kernel."""
    for values, outputs, count in product(VALUES, OUTPUTS, ROWS):
        key = f"nvcc/h100/2:4/{values}/{outputs} outputs/{count} rows"
        yield Row(key, partial(_row, values, outputs, count))


def _row(values: str, outputs: int, count: int) -> dict[str, Any]:
    return parsed(report())[values, outputs, count]


@cache
def report() -> str:
    """What `ptxas` prints of all variants.

    Raises:
      NotImplementedError: nvcc is missing.
    """
    nvcc = build.find_nvcc()
    if nvcc is None:
        raise NotImplementedError("nvcc is missing: install the CUDA toolkit and set CUDA_HOME")
    source = build.FOLDER / "gpu" / "src" / "decode.cu"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90", "-cubin", "-Xptxas=-v", str(source)]
        command += ["-o", str(Path(folder) / "decode.cubin")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def parsed(text: str) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The variants in a report: (values, outputs, rows) -> figures."""
    named = {key: name for name, key in VALUES.items()}
    found = {}
    for numbers, *counts, value, stores, loads, registers, shared in ENTRY.findall(text):
        outputs, tiles, warps = map(int, counts)
        found[named[numbers, value], outputs, 8 * tiles] = {
            "registers": int(registers),
            "spilled_bytes": int(stores) + int(loads),
            "shared_bytes": int(shared),
            "occupancy": occupancy(int(registers), int(shared), warps),
        }
    return found


def occupancy(registers: int, shared: int, warps: int) -> float:
    """The share of a multiprocessor's threads that blocks of so many warps keep busy.

    Args:
      registers: of a thread.
      shared: bytes of a block.
      warps: of a block.
    """
    of_warp = -(-32 * registers // UNIT) * UNIT
    limits = (
        REGISTERS // (of_warp * warps),
        THREADS // (32 * warps),
        SHARED // (shared + SYSTEM_SHARED),
        BLOCKS,
    )
    return min(limits) * 32 * warps / THREADS
