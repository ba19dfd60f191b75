"""Static schedules of TPU kernels, from the files that the compiler dumps.

A TPU core issues one VLIW bundle per cycle in an order fixed by the compiler. So the bundles of a
kernel, those in a loop times the loop's trips, over the clock, estimate its time of computing;
waiting for memory is not in it. The larger of that and the time of its bytes is an estimate of the
time of the kernel: an estimate, not a measurement.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Per chip: bytes per second of its memory, and cycles per second of a core.
BANDWIDTH = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9}
CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}

BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+((?:[A-Z]{2}\s*)*):")
# The test may stand long before its branch, behind a predicate: `totalorder (%p3), %s26, 16`.
EXIT = re.compile(r"%(\w+) = scmp\.\S+ (?:\([^)]*\), )?%(\w+), (\d+) /\* loop exit test \*/")
# A loop that the compiler has unrolled counts by more than one.
STEP = re.compile(r"%(\w+) = sadd\.s32 (?:\([^)]*\), )?(\d+), %")
BACK = re.compile(r" sbr\.rel \(!%(\w+)\)")
DELAY = 4  # bundles behind a branch that run before it takes effect


@dataclass(frozen=True)
class Kernel:
    """A kernel's schedule.

    Args:
      name: of the HLO instruction, such as "mask.1".
      bundles: in the program of the kernel.
      cycles: bundles weighed by the trips of the loops around them.
    """

    name: str
    bundles: int
    cycles: int


@contextmanager
def dumped(folder: Path) -> Iterator[Path]:
    """Compilations inside write their schedules to `folder`, which is emptied first and last.

    The compiler reads the option once a process: see `compilers.set_up(dump=folder)`.
    """
    _empty(folder)
    yield folder
    _empty(folder)


def _empty(folder: Path) -> None:
    for file in os.scandir(folder):
        Path(file.path).unlink()


def kernels(folder: Path) -> list[Kernel]:
    """The schedules in a folder, the longest first."""
    found = []
    for file in folder.glob("*final_bundles.txt"):
        name = re.match(r"\d+-(.+)-\d+-final_bundles\.txt", file.name)
        # Two files begin alike: an analysis and the schedule itself.
        if name and "schedule-analysis" not in file.name and "<" not in file.name:
            text = file.read_text("utf-8", errors="replace")
            found.append(Kernel(name[1], *schedule(text)))
    return sorted(found, key=lambda kernel: -kernel.cycles)


def schedule(text: str) -> tuple[int, int]:
    """Bundles of a schedule, and cycles: bundles times the trips of the loops around them.

    Raises:
      NotImplementedError: the schedule does not say how often a loop runs.
    """
    starts: list[int] = []
    loops: list[tuple[int, int, int]] = []  # first bundle, last bundle, trips
    trips: dict[str, int] = {}  # by the register that the branch back reads
    steps = {counter: int(step) for counter, step in STEP.findall(text)}
    address = -1
    for line in text.splitlines():
        if found := BUNDLE.match(line):
            address = int(found[1], 0)
            if "LB" in found[2]:
                starts.append(address)
        for register, counter, count in EXIT.findall(line):
            trips[register] = math.ceil(int(count) / steps.get(counter, 1))
        if (found := BACK.search(line)) and found[1] in trips:
            loops.append((starts.pop(), address + DELAY, trips[found[1]]))
    if starts:
        raise NotImplementedError(f"the loop at bundle {starts[-1]:#x} states no number of trips")
    cycles = address + 1
    for first, last, count in loops:
        around = [n for a, b, n in loops if a < first and last <= b]
        cycles += (last - first + 1) * (count - 1) * math.prod(around)
    return address + 1, cycles


def seconds(kernel: Kernel, chip: str) -> float:
    """Estimated time of computing on one core of a chip of `CLOCK`."""
    return kernel.cycles / CLOCK[chip]


def estimate(found: list[Kernel], size: int, chip: str) -> dict[str, Any]:
    """The time of computing of all kernels beside the time of moving `size` bytes, and the larger.

    Args:
      found: kernels of one program.
      size: bytes that it must read and write.
      chip: of `CLOCK`.
    """
    compute, memory = sum(seconds(k, chip) for k in found), size / BANDWIDTH[chip]
    return {
        "compute_us": 1e6 * compute,
        "bytes_us": 1e6 * memory,
        "compute_over_bytes": compute / memory,
        "estimate_us": 1e6 * max(compute, memory),
        "kernels": [asdict(kernel) for kernel in found],
    }
