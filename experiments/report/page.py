"""Results as a table on the console and as one HTML page that needs no other file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.report.block_findings import BlockRow, block_claims, block_tables, price_sentences
from experiments.report.figures import draw_all
from experiments.report.findings import (
    Data,
    Row,
    Summary,
    claims,
    metric_of,
    metrics_of,
    rows,
    sweep_rows,
    total_pull,
)
from experiments.report.pictures import METHOD_COLORS, name_of
from experiments.report.reasons import pull_sentences, reasons, scale_sentence
from experiments.tasks.task import Metric
from experiments.training.methods import METHODS

Cells = tuple[str, ...]


def table_header(data: Data) -> Cells:
    """The column titles of `table_cells`."""
    metrics = (metric.title for metric in metrics_of(data))
    return ("method", *metrics, "loss", "SAD %", "flips ‰", "kept %", "time")


def table_cells(row: Row) -> Cells:
    """A row as text: mean ± standard error over the seeds, of further metrics the mean alone.

    Metrics, loss and density are those at the end; SAD is against the initial weights' masks;
    flips are mask entries changed by one step, on average over training; time is a step's, over
    that of dense training.
    """
    (first, _), *others = row.metrics
    return (
        name_of(row.method),
        _with_error(row.metric, scale=first.scale, digits=first.digits),
        *(f"{m.scale * values.mean:.{m.digits}f}" for m, values in others),
        _with_error(row.loss, scale=1, digits=3),
        _with_error(row.sad, scale=100, digits=1),
        _with_error(row.flip_rate, scale=1000, digits=2),
        f"{100 * row.density.mean:.3g}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
    )


def block_header(data: Data) -> Cells:
    """The column titles of `block_cells`."""
    first = ("method", metric_of(data).title, "loss")
    return (*first, "kept %", "in a row", "balance", "regrown")


def block_cells(pattern: str, found: BlockRow) -> Cells:
    """A row of a block pattern's table as text.

    In a row: the fewest and the most blocks that a row of the largest layer keeps / how many there
    are; balance: mean over a layer's rows over the most, mean over the layers; regrown: blocks that
    came back in an epoch, mean over the epochs.
    """
    name, metric, *_, loss, _, _, kept, _ = table_cells(found.row)
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
        *table_cells(row)[1:-2],
    )


def print_table(data: Data, console: Console) -> None:
    """Prints the table of the finished trials."""
    settings = data["settings"]
    title = f"{settings['task']}, mean±standard error over {len(settings['seeds'])} seeds"
    baselines = _baselines(data)
    title = f"{title}; without learning: {baselines}" if baselines else title
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for index, heading in enumerate(table_header(data)):
        # Over several lines, so that eighty columns suffice.
        table.add_column(
            heading.replace(" ", "\n"), justify="left" if index == 0 else "right", no_wrap=True
        )
    for group in _by_pattern(rows(data), metric_of(data)):
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
    page = environment.get_template("page.html.jinja").render(**_content(data, pictures))
    path = folder / "report.html"
    path.write_text(page)
    return path


def _content(data: Data, pictures: list[Any]) -> dict[str, Any]:
    table = rows(data)
    found = claims(data)
    blocks = block_tables(data)
    trained = [*table, *rows(data, "blocks")]
    metric = metric_of(data)
    return {
        "settings": data["settings"],
        "metric": metric,
        "baselines": _baselines(data),
        "optimizer": _optimizer(data["settings"]),
        "shown": _shown(data),
        "machine": data["machine"],
        "about": _about(data["settings"]["task"]),
        "methods": {
            name_of(name): METHODS[name].what for name in dict.fromkeys(r.method for r in trained)
        },
        "header": table_header(data),
        "patterns": _by_pattern(table, metric),
        "best": {p: _best_sparse(table, p, metric) for p in {row.pattern for row in table}},
        "sweep_header": ("λ", "λ · Σ lr", *table_header(data)[1:-2]),
        "sweeps": [
            [sweep_cells(data, row) for row in sweep_rows(data, decoupled=after)]
            for after in (False, True)
        ],
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


def _by_pattern(table: list[Row], metric: Metric) -> list[dict[str, Any]]:
    """Rows grouped by pattern, each with what a template needs to draw it."""
    worst = max((metric.missing(row.metric.mean) for row in table), default=1.0) or 1.0
    return [
        {
            "pattern": pattern,
            "rows": [
                {
                    "method": row.method,
                    "cells": table_cells(row),
                    "color": METHOD_COLORS.get(row.method, "#666"),
                    "missing": f"{metric.missing(row.metric.mean):.{metric.digits - 1}f}",
                    "bar": 100 * metric.missing(row.metric.mean) / worst,
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


def _best_sparse(table: list[Row], pattern: str, metric: Metric) -> str:
    sparse = [row for row in table if row.pattern == pattern and row.method != "dense"]
    return max(sparse, key=lambda row: metric.sign * row.metric.mean).method if sparse else ""


def _baselines(data: Data) -> str:
    """The metric without any learning worth the name, by kind."""
    metric, found = metric_of(data), data["settings"]["baselines"]
    values = [f"{name} {metric.scale * value:.{metric.digits}f}" for name, value in found.items()]
    return f"{metric.title} {', '.join(values)}" if values else ""


def _optimizer(settings: Data) -> str:
    """The recipe as a sentence."""
    recipe = settings["recipe"]
    decay = {
        "cosine": "cosine to zero step by step",
        "linear": "linear to zero step by step",
        "inverse_sqrt": "the inverse square root of the step",
    }
    if recipe["optimizer"] == "adamw":
        betas = f"{recipe['momentum']:g} and {recipe['second_momentum']:g}"
        optimizer = f"AdamW with betas {betas}"
    else:
        optimizer = f"the paper's optimizer: SGD with momentum {recipe['momentum']:g}"
    clip = f", gradients clipped to a norm of {recipe['clip']:g}" if recipe["clip"] else ""
    return (
        f"All methods get the same budget and {optimizer}{clip}, batch {recipe['batch_size']}, "
        f"learning rate {recipe['learning_rate']:g} after a linear warm-up of "
        f"{recipe['warmup_epochs']:.3g} epochs, then {decay[recipe['schedule']]}, "
        f"weight decay {recipe['weight_decay']:g}."
    )


def _shown(data: Data) -> list[dict[str, Any]]:
    """What the networks of the first seed made of each example, method by method."""
    trials = {name: examples for name, examples in data.get("shown", {}).items() if examples}
    if not trials:
        return []
    found = []
    for index, example in enumerate(next(iter(trials.values()))):
        *given, own = example
        answers = {name: examples[index][own] for name, examples in trials.items()}
        drawn = all(text.startswith("data:image/") for text in example.values())
        texts = {name: example[name] for name in given}
        found.append({"given": texts, "answers": answers, "drawn": drawn})
    return found


def _about(task: str) -> list[str]:
    """What the task's own file says about it, by paragraphs; how to run it is left out."""
    if importlib.util.find_spec(f"experiments.tasks.{task}") is None:
        return []  # It lies outside of this repository.
    text = inspect.getdoc(importlib.import_module(f"experiments.tasks.{task}")) or ""
    paragraphs = [part for part in text.split("\n\n") if not part.startswith("Run:")]
    return [" ".join(part.split()) for part in paragraphs]


def _with_error(summary: Summary, *, scale: float, digits: int) -> str:
    mean, error = scale * summary.mean, scale * summary.error
    if len(summary.values) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {error:.{digits}f}"
