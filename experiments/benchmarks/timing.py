"""How every benchmark measures: interleaved, after warm-up, the median of many, as a ratio.

If two things are timed one after the other, the comparison includes whatever else the machine did
meanwhile. Here each round runs every candidate once, so a slow spell hits all of them, and the
report is a ratio to a baseline of the same run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.json_files import machine, plain, write_json
from nmjax.analysis.timing import interleaved_times as interleaved_times
from nmjax.analysis.timing import output_on_cores

RESULTS = Path(__file__).parent / "results"


def interleaved_medians(
    functions: Mapping[str, Callable[..., Any]], *arguments: Any, **settings: Any
) -> dict[str, float]:
    """Median seconds of each function, timed by `nmjax.analysis.timing.interleaved_times`."""
    times = interleaved_times(functions, *arguments, **settings)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def rows_by_threads(command: Sequence[str], threads: Sequence[int]) -> dict[int, list[Any]]:
    """Runs a Python program that prints rows as lines of JSON, once for each number of threads.

    Args:
      command: arguments of the interpreter, such as `["-m", "module", "--here"]`.
      threads: numbers of threads; each has a process and as many cores.

    Returns:
      threads -> rows, which are printed as tables too.
    """
    found = {}
    for count in threads:
        printed = output_on_cores([sys.executable, *command], count)
        found[count] = [json.loads(line) for line in printed.splitlines()]
        print_table(f"{count} thread{'s' * (count > 1)}", found[count])
    return found


def write_results(name: str, results: Any) -> Path:
    """Writes `results/<name>.json`: the results, and with them the machine and the date."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "results": results,
    }
    write_json(path, plain(content), indent=1)
    return path


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows with equal keys, numbers right-aligned, and below them the machine."""
    table = Table(title=title)
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    # A file or a pipe has no width of its own; 140 columns break no word of these tables.
    console = Console() if Console().is_terminal else Console(width=140)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()))
