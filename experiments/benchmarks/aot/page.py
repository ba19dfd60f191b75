"""The rows as Markdown tables, the way docs/tpu.md quotes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from experiments.benchmarks.aot.steps import beside_dense

Rows = list[dict[str, Any]]


def tables(rows: Rows) -> str:
    """Masks, schedules, packed products, H100 and training steps, one table each."""
    found = {str(row["key"]): row for row in rows}
    sections = [
        _grid("Bytes over one read and one write; temporaries in MiB", found, "masks", _bytes),
        _grid("Kernels: computing over bytes, estimated", found, "schedules", _schedule),
        _grid("Packed products: time over the dense one's, estimated", found, "decode", _decode),
        _grid("H100: kernels; bytes; temporaries in MiB", found, "gpu", _gpu),
        _grid("H100: decode kernel, registers; spills; occupancy", found, "nvcc", _nvcc),
        _steps(found),
    ]
    return "\n\n".join(section for section in sections if section)


def _bytes(row: dict[str, Any]) -> str:
    return f"{row['bytes_over_least']:.2f}, {row['temporaries_MiB']:.0f}"


def _schedule(row: dict[str, Any]) -> str:
    return f"{row['compute_over_bytes']:.2f}" if row["kernels"] else "XLA"


def _decode(row: dict[str, Any]) -> str:
    return f"{row['over_dense']:.2f} ({row['compute_us']:.0f} / {row['bytes_us']:.0f} us)"


def _gpu(row: dict[str, Any]) -> str:
    return f"{row['kernels']}, {row['bytes_over_least']:.2f}, {row['temporaries_MiB']:.0f}"


def _nvcc(row: dict[str, Any]) -> str:
    return f"{row['registers']}; {row['spilled_bytes']} bytes; {row['occupancy']:.0%}"


def _grid(title: str, found: dict[str, dict[str, Any]], section: str, cell: Any) -> str:
    """A table with a line for each chip and operation, and a column for each pattern."""
    cells: dict[str, dict[str, str]] = {}
    for key, row in found.items():
        first, *names = key.split("/")
        if first == section:
            pattern = next((name for name in names if ":" in name), "dense")
            line = ", ".join(name for name in names if name != pattern)
            text = row["refused"] if "refused" in row else cell(row)
            cells.setdefault(line, {})[pattern] = text
    patterns = sorted({pattern for line in cells.values() for pattern in line})
    lines = [[name, *(line.get(p, "") for p in patterns)] for name, line in cells.items()]
    return markdown(title, ["", *patterns], lines)


def _steps(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        [
            row["key"].removeprefix("steps/"),
            ", ".join(f"{kind} {n:+}" for kind, n in row["collectives_added"].items()) or "0",
            f"{row['copies_added']:+}",
            f"{row['bytes']:.4f}",
            f"{row['peak']:.4f}",
        ]
        for row in beside_dense({k: row for k, row in found.items() if k.startswith("steps")})
    ]
    names = ["step", "collectives added", "copies added", "bytes", "peak memory"]
    return markdown("Training steps beside the dense step", names, lines)


def markdown(title: str, names: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table under its title; empty without lines."""
    body = [f"| {' | '.join(line)} |" for line in lines]
    rule = "|" + "---|" * len(names)
    return "\n".join([f"{title}\n", f"| {' | '.join(names)} |", rule, *body]) if body else ""
