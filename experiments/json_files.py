"""What runs, comparisons and benchmarks write as JSON: plain numbers, the machine, whole files."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nmjax.files.whole_files import write_whole

Numbers = dict[str, Any]


def plain(value: Any, digits: int = 17) -> Any:
    """Converts arrays, tuples and dicts to what JSON has; numbers that are not finite are null.

    Floats get that number of significant digits; 17 keep every bit.
    """
    if isinstance(value, dict):
        return {name: plain(entry, digits) for name, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), digits)
    if isinstance(value, list | tuple):
        return [plain(entry, digits) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def machine() -> Numbers:
    """Describes the machine: processor, cores this process may use, load, devices, versions."""
    device, packages = jax.devices()[0], ("jax", "jaxlib", "flax", "optax", "numpy")
    allowed = getattr(os, "sched_getaffinity", None)  # macOS and Windows do not have it.
    return {
        "processor": _processor(),
        "cores": len(allowed(0)) if allowed else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "device": f"{jax.device_count()} x {device.platform} ({device.device_kind})",
        "system": platform.platform(),
        "python": platform.python_version(),
        # Some benchmarks run on machines without flax.
        **{name: version(name) for name in packages if find_spec(name)},
    }


def differences(now: Any, expected: Any) -> str:
    """Says where two nested dicts differ, such as "recipe epochs is 3, not 2"; "" if nowhere."""
    # Two other models differ in all of their leaves.
    return "; ".join(islice(_differences(now, expected, ""), 8))


def read_json(path: Path) -> Any:
    """Reads a file; raises a ValueError that names it if it does not hold JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_json(path: Path, value: Any, **style: Any) -> None:
    """Writes a file whole or not at all; `style` goes to `json.dumps`."""
    text = json.dumps(value, **style) + "\n"
    write_whole(path, lambda part: part.write_text(text, "utf-8"))


@dataclass(frozen=True)
class JsonLines:
    """A file of JSON objects, one a line, that grows at its end. The first line creates it."""

    path: Path

    def read(self) -> list[Numbers]:
        """All lines, except a last one that was cut off while it was written.

        Raises:
          ValueError: a line is damaged.
        """
        entries = self._entries()
        if damaged := [number for number, entry in entries.items() if entry is None]:
            raise ValueError(f"{self.path} is damaged: line {damaged[0]} is not a JSON object")
        return [entry for entry in entries.values() if entry is not None]

    def append(self, entry: Numbers) -> None:
        """Adds a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(entry)) + "\n")

    def keep(self, name: str, highest: int) -> list[int]:
        """Keeps the lines where a number is at most `highest`, and drops the others.

        Args:
          name: of the number, an integer. A line without it is damaged, and is dropped too.
          highest: the highest number to keep.

        Returns:
          The numbers of the damaged lines, from 1.
        """
        damaged, text = [], ""
        for number, entry in self._entries().items():
            found = (entry or {}).get(name)
            if not isinstance(found, int) or isinstance(found, bool):
                damaged.append(number)
            elif found <= highest:
                text += json.dumps(entry) + "\n"
        write_whole(self.path, lambda part: part.write_text(text, "utf-8"))
        return damaged

    def _entries(self) -> dict[int, Numbers | None]:
        """The whole lines by number, from 1; None where a line is damaged."""
        if not self.path.exists():
            return {}
        # Only "\n" ends a line: damage may look like other line ends.
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return {number: _parsed(line) for number, line in enumerate(lines, 1)}


def _parsed(line: bytes) -> Numbers | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _differences(now: Any, expected: Any, name: str) -> Iterator[str]:
    if isinstance(now, dict) and isinstance(expected, dict):
        for key in dict.fromkeys([*expected, *now]):
            # A key that is missing is None, so a run can be resumed after a new flag, with None for
            # its default, has come.
            yield from _differences(now.get(key), expected.get(key), f"{name} {key}".strip())
    elif now != expected:
        yield f"{name} is {now}, not {expected}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # `platform.processor` often finds nothing on Linux.
    text = info.read_text("utf-8", "replace") if info.exists() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.M)
    return found[1] if found else platform.processor() or platform.machine()
