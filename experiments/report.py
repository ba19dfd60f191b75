"""Results as a table on the console and as one HTML page that needs no other file."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.block_findings import BlockRow, block_claims, block_tables, price_sentences
from experiments.figures import draw_all
from experiments.findings import (
    Data,
    Row,
    Summary,
    claims,
    metric_name,
    rows,
    sweep_rows,
    total_pull,
)
from experiments.methods import METHODS
from experiments.pictures import METHOD_COLORS, name_of
from experiments.reasons import pull_sentences, reasons, scale_sentence

Cells = tuple[str, ...]


def table_header(data: Data) -> Cells:
    """The column titles of `table_cells`."""
    metric = f"{metric_name(data)} %"
    return ("method", metric, "loss", "SAD %", "flips ‰", "kept %", "time")


def table_cells(row: Row) -> Cells:
    """A row as text: mean ± standard error over the seeds.

    Metric, loss and density are those at the end; SAD is against the initial weights' masks;
    flips are mask entries changed by one step, on average over training; time is a step's, over
    that of dense training.
    """
    return (
        name_of(row.method),
        _with_error(row.metric, scale=100, digits=2),
        _with_error(row.loss, scale=1, digits=3),
        _with_error(row.sad, scale=100, digits=1),
        _with_error(row.flip_rate, scale=1000, digits=2),
        f"{100 * row.density.mean:.3g}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
    )


def block_header(data: Data) -> Cells:
    """The column titles of `block_cells`."""
    return (*table_header(data)[:3], "kept %", "in a row", "balance", "regrown")


def block_cells(pattern: str, found: BlockRow) -> Cells:
    """A row of a block pattern's table as text.

    In a row: the fewest and the most blocks that a row of the largest layer keeps / how many there
    are; balance: mean over a layer's rows over the most, mean over the layers; regrown: blocks that
    came back in an epoch, mean over the epochs.
    """
    name, metric, loss, *_, kept, _ = table_cells(found.row)
    fewest, most, inputs = found.kept
    beside = found.row.method != "dense" and found.row.pattern != pattern
    return (
        f"{name} {found.row.pattern}" if beside else name,
        metric,
        loss,
        kept,
        f"{fewest}-{most}/{inputs}" if found.layer else "",
        f"{100 * found.balance.mean:.0f} %" if found.balance else "",
        f"{found.regrown.mean:.1f}" if found.regrown else "",
    )


def sweep_cells(data: Data, row: Row) -> Cells:
    """A row of the sweep as text."""
    return (
        f"{row.lambda_w:.3g}",
        f"{total_pull(data, row.lambda_w):.3g}",
        *table_cells(row)[1:5],
    )


def print_table(data: Data, console: Console) -> None:
    """Prints the table of the finished trials."""
    settings = data["settings"]
    title = f"{settings['task']}, mean±standard error over {len(settings['seeds'])} seeds"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for index, heading in enumerate(table_header(data)):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for group in _by_pattern(rows(data)):
        table.add_row(f"[bold]{group['pattern']}[/bold]")
        for row in group["rows"]:
            table.add_row(*(cell.replace(" ± ", "±") for cell in row["cells"]))
        table.add_section()
    console.print(table)
    _print_block_tables(data, console)


def _print_block_tables(data: Data, console: Console) -> None:
    found = block_tables(data)
    if not found:
        return
    table = Table(title="1xN blocks", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for index, heading in enumerate(block_header(data)):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for pattern, block_rows in found.items():
        table.add_row(f"[bold]{pattern}[/bold]")
        for row in block_rows:
            table.add_row(*(cell.replace(" ± ", "±") for cell in block_cells(pattern, row)))
        table.add_section()
    console.print(table)


def write_report(data: Data, folder: Path) -> Path:
    """Writes `report.html` and each picture as an SVG file.

    Args:
      data: the content of `results.json`, finished or not.
      folder: written into.

    Returns:
      The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(data)
    for picture in pictures:
        (folder / f"{picture.name}.svg").write_bytes(picture.svg)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(**_content(data, pictures))
    path = folder / "report.html"
    path.write_text(page)
    return path


def _content(data: Data, pictures: list[Any]) -> dict[str, Any]:
    table = rows(data)
    found = claims(data)
    blocks = block_tables(data)
    trained = [*table, *rows(data, "blocks")]
    return {
        "settings": data["settings"],
        "machine": data["machine"],
        "about": _about(data["settings"]["task"]),
        "methods": {
            name_of(name): METHODS[name].what for name in dict.fromkeys(r.method for r in trained)
        },
        "header": table_header(data),
        "patterns": _by_pattern(table),
        "best": {p: _best_sparse(table, p) for p in {row.pattern for row in table}},
        "sweep_header": ("λ", "λ · Σ lr", *table_header(data)[1:5]),
        "sweep": [sweep_cells(data, row) for row in sweep_rows(data)],
        "claims": found,
        "agreement": Counter(at.seen for claim in found for at in claim.at.values()),
        "block_header": block_header(data),
        "blocks": _blocks(blocks),
        "block_claims": block_claims(data),
        "price": price_sentences(data),
        "reasons": reasons(data),
        "scale": scale_sentence(data),
        "pull": pull_sentences(data),
        "pictures": {picture.name: picture for picture in pictures},
        "errors": [
            (t["pattern"], name_of(t["method"]), t["error"]) for t in data["trials"] if t["error"]
        ],
        "seconds": sum(t["seconds"] for t in data["trials"]),
        "timed": data.get("step_times", []),
    }


def _by_pattern(table: list[Row]) -> list[dict[str, Any]]:
    """Rows grouped by pattern, each with what a template needs to draw it."""
    worst = max((100 * (1 - row.metric.mean) for row in table), default=1.0) or 1.0
    return [
        {
            "pattern": pattern,
            "rows": [
                {
                    "method": row.method,
                    "cells": table_cells(row),
                    "color": METHOD_COLORS.get(row.method, "#666"),
                    "wrong": 100 * (1 - row.metric.mean),
                    "bar": 1e4 * (1 - row.metric.mean) / worst,
                }
                for row in table
                if row.pattern == pattern
            ],
        }
        for pattern in dict.fromkeys(row.pattern for row in table)
    ]


def _blocks(found: dict[str, list[BlockRow]]) -> list[dict[str, Any]]:
    """The tables of the block patterns as a template draws them."""
    return [
        {
            "pattern": pattern,
            "rows": [
                {
                    "cells": block_cells(pattern, row),
                    "color": METHOD_COLORS.get(row.row.method, "#666"),
                }
                for row in block_rows
            ],
        }
        for pattern, block_rows in found.items()
    ]


def _best_sparse(table: list[Row], pattern: str) -> str:
    sparse = [row for row in table if row.pattern == pattern and row.method != "dense"]
    return max(sparse, key=lambda row: row.metric.mean).method if sparse else ""


def _about(task: str) -> list[str]:
    """What the task's own file says about it, by paragraphs."""
    text = inspect.getdoc(importlib.import_module(f"experiments.tasks.{task}")) or ""
    return [" ".join(part.split()) for part in text.split("\n\n")]


def _with_error(summary: Summary, *, scale: float, digits: int) -> str:
    mean, error = scale * summary.mean, scale * summary.error
    if len(summary.values) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {error:.{digits}f}"
