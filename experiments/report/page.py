"""The report of a comparison: one HTML page that needs no other file."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.report import curves, final_numbers, mask_maps, sentences, tables
from experiments.report.claims import judge
from experiments.report.numbers import Data, Run
from experiments.report.pictures import STYLE, Picture, name_of, source
from experiments.training.methods import METHODS

# Each returns None where the results that it needs are missing.
_PICTURES: dict[str, Callable[[Run], Picture | None]] = {
    "examples": mask_maps.draw_examples,
    "curves": curves.draw_metric_curves,
    "seeds": final_numbers.draw_seeds,
    "layer_sad": final_numbers.draw_layer_sad,
    "sad_over_time": curves.draw_sad_over_time,
    "sweep": final_numbers.draw_sweep,
    "shapes": mask_maps.draw_shapes,
    "block_curves": partial(curves.draw_metric_curves, part="blocks"),
    "block_changes": curves.draw_block_changes,
    "block_masks": mask_maps.draw_block_masks,
    "balance": final_numbers.draw_balance,
}


def write_report(data: Data, folder: Path) -> Path:
    """Writes `report.html` and each picture as an SVG file; returns the path of the page.

    Args:
      data: the content of `results.json`, finished or not.
      folder: written into.
    """
    run = Run(data)
    pictures = draw_all(run)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (folder / f"{name}.svg").write_bytes(picture.svg)
    path = folder / "report.html"
    path.write_text(_render(run, pictures), encoding="utf-8")
    return path


def draw_all(run: Run) -> dict[str, Picture]:
    """Every picture that the trials allow, by name."""
    with mpl.rc_context(STYLE):
        drawn = {name: draw(run) for name, draw in _PICTURES.items()}
    return {name: picture for name, picture in drawn.items() if picture is not None}


def _render(run: Run, pictures: dict[str, Picture]) -> str:
    """Fills the template; it gets text and numbers only, so that it calls nothing."""
    sweeps = [tables.sweep_table(run, decoupled=after) for after in (False, True)]
    methods = dict.fromkeys(row.method for row in run.part("main", "blocks"))
    findings = {part: judge(run, run.groups(part)) for part in ("main", "blocks")}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Texts in the results are data, not HTML.
        autoescape=True,
        # A misspelled name is an error, not a gap in the page.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        settings=run.settings,
        machine=run.data["machine"],
        seconds=sum(trial["seconds"] for trial in run.data["trials"]),
        stopped=[t for t in run.data["trials"] if t["error"]],
        is_timed=bool(run.data.get("step_times")),
        baselines=tables.baselines(run),
        error_title=run.metric.missing_title,
        opening=sentences.opening(run),
        dense_layers=sentences.plain_rules(run.settings["keep_dense"]),
        summaries={
            pattern: [sentences.headline(run, pattern), *sentences.reasons(run, pattern)]
            for pattern in run.groups("main")
        },
        about=_about(run.settings["task"]),
        methods={name_of(name): METHODS[name].what for name in methods},
        table=tables.main_table(run),
        shown=_shown(run.data.get("shown", {})),
        findings=findings,
        counts=Counter(at.seen for f in findings["main"] for at in f.at if at and f.source),
        sweeps=[sweep for sweep in sweeps if any(len(g) > 2 for g in sweep.groups.values())],
        blocks=tables.block_table(run),
        pictures={
            name: (source(drawn.svg), source(drawn.narrow), drawn.facts)
            for name, drawn in pictures.items()
        },
    )


def _shown(shown: dict[str, list[dict[str, str]]]) -> list[dict[str, Any]]:
    """What the networks of the first seed made of each example, method by method."""
    trials = {name: examples for name, examples in shown.items() if examples}
    found = []
    for index, example in enumerate(next(iter(trials.values()), [])):
        *given, own = example  # The last column is the network's own.
        texts = {name: example[name] for name in given}
        for title, examples in trials.items():  # Such as "2:4 sr_ste, lambda_w 0.02".
            pattern, method = title.split(",")[0].split(" ")
            texts[f"{pattern} {name_of(method)}"] = examples[index][own]
        is_drawn = all(text.startswith("data:image/") for text in example.values())
        found.append({"texts": texts, "is_drawn": is_drawn})
    return found


def _about(task: str) -> list[str]:
    """What the task's file says about it, by paragraphs, without how to run it.

    The file is read, not imported: the page needs none of the models that it imports.
    """
    path = Path(__file__).parents[1] / "tasks" / f"{task}.py"
    if not path.exists():  # The task is not one of this repository.
        return []
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return [" ".join(p.split()) for p in text.split("\n\n") if not p.startswith("Run:")]
