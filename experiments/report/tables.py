"""The tables of a comparison as text, for the page and for the console."""

from __future__ import annotations

from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as ConsoleTable

from experiments.report.numbers import Data, Row, Run
from experiments.report.pictures import color_of, label_of, name_of


class Line(NamedTuple):
    """A line of a table: its cells, and how they are marked."""

    cells: tuple[str, ...]
    color: str = ""
    is_best: bool = False


class Table(NamedTuple):
    """A table: the titles of its columns, and pattern -> lines."""

    header: tuple[str, ...]
    groups: dict[str, list[Line]]


def main_table(run: Run) -> Table:
    """The N:M methods, with all numbers and the time of a step relative to dense."""
    names = _names(run)
    groups: dict[str, list[Line]] = {}
    for pattern, rows in run.groups("main").items():
        best = run.best([row for row in rows if row.method != "dense"])
        for row in rows:
            time = "" if row.ratio is None else f"{row.ratio:.2f}"
            cells = (name_of(row.method), *_cells(run, row, names), time)
            groups.setdefault(pattern, []).append(Line(cells, color_of(row.method), row is best))
    return Table(("method", *_titles(run, names), "time"), groups)


def block_table(run: Run) -> Table:
    """The methods for blocks, below what they are compared with.

    "In a row" is the fewest and the most blocks that a row of the largest layer keeps / how many
    blocks it has.
    """
    names = ["metric", "loss", "density", "balance", "regrown"]
    groups: dict[str, list[Line]] = {}
    for pattern, rows in run.groups("blocks").items():
        for row in rows:
            cells = (label_of(row, pattern), *_cells(run, row, names), _in_a_row(run, row))
            groups.setdefault(pattern, []).append(Line(cells, color_of(row.method)))
    return Table(("method", *_titles(run, names), "in a row"), groups)


def sweep_table(run: Run, *, decoupled: bool) -> Table:
    """The strengths of SR-STE, with the pull before or after the preconditioner."""
    # Without the density, which is the same for all.
    names, rows = _names(run)[:-1], run.sweep(decoupled=decoupled)
    best = run.best(rows)
    # STE is SR-STE of strength 0.
    zero = next((row for row in rows if row.method == "ste"), None)
    groups: dict[str, list[Line]] = {}
    for row in rows:
        pull = row.lambda_w * run.settings["rate_sum"]
        gap = run.gap(row, zero) if zero and row is not zero else ""
        cells = (f"{row.lambda_w:.3g}", f"{pull:.3g}", *_cells(run, row, names), gap)
        groups.setdefault(row.pattern, []).append(Line(cells, is_best=row is best))
    return Table(("λ", "λ · Σ lr", *_titles(run, names), "against STE"), groups)


def baselines(run: Run) -> str:
    """The metric of predictors that have learned little or nothing."""
    number = run.shown["metric"]
    values = run.settings["baselines"].items()
    parts = [f"{name} {number.scale * value:{number.form}}" for name, value in values]
    return f"{', '.join(parts)} ({number.title})" if parts else ""


def print_table(data: Data, console: Console) -> None:
    """Prints the tables of the trials that ended."""
    run = Run(data)
    title = f"{run.settings['task']}, mean±standard error over {len(run.settings['seeds'])} seeds"
    if baselines(run):
        title += f"; without learning: {baselines(run)}"
    for shown, name in ((main_table(run), title), (block_table(run), "1xN blocks")):
        if not shown.groups and name != title:
            continue
        table = ConsoleTable(title=name, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for index, heading in enumerate(shown.header):
            # One word per line, so that the table fits into eighty columns.
            lines = heading.replace(" ", "\n")
            table.add_column(lines, justify="left" if index == 0 else "right", no_wrap=True)
        for pattern, group in shown.groups.items():
            table.add_row(f"[bold]{pattern}[/bold]")
            for line in group:
                table.add_row(*(cell.replace(" ± ", "±") for cell in line.cells))
            table.add_section()
        console.print(table)


def _names(run: Run) -> list[str]:
    others = [metric.name for metric in run.metrics[1:]]
    return ["metric", *others, "loss", "sad", "flip_rate", "density"]


def _titles(run: Run, names: list[str]) -> list[str]:
    return [run.shown[name].title for name in names]


def _cells(run: Run, row: Row, names: list[str]) -> list[str]:
    return [
        run.shown[name].show(row.numbers[name]) if name in row.numbers else "" for name in names
    ]


def _in_a_row(run: Run, row: Row) -> str:
    if not row.kept:
        return ""
    layer = run.largest_layer(row.pattern)
    # Rows differ between the seeds too, so the range is over both.
    kept, inputs = row.kept[layer], run.settings["blocks"][row.pattern][layer]
    return f"{kept.min()}-{kept.max()}/{inputs}"
