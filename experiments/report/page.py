"""The report of a comparison: one HTML page that needs no other file."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.report import curves, final_numbers, mask_maps, sentences, tables
from experiments.report.claims import Finding, judge
from experiments.report.numbers import Data, Run
from experiments.report.pictures import STYLE, Picture, color_of, name_of
from experiments.training.methods import METHODS

_PICTURES = (
    mask_maps.draw_examples,
    curves.draw_metric_curves,
    final_numbers.draw_seeds,
    final_numbers.draw_layer_sad,
    curves.draw_sad_over_time,
    final_numbers.draw_sweep,
    mask_maps.draw_shapes,
    curves.draw_block_curves,
    curves.draw_block_changes,
    mask_maps.draw_block_masks,
    final_numbers.draw_balance,
)


def write_report(data: Data, folder: Path) -> Path:
    """Writes `report.html` and each picture as an SVG file.

    Args:
      data: the content of `results.json`, finished or not.
      folder: written into.

    Returns:
      The path of the page.
    """
    run = Run(data)
    findings = {part: judge(run, run.patterns(part)) for part in ("main", "blocks")}
    pictures = draw_all(run)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.name}.svg").write_bytes(picture.svg)
    path = folder / "report.html"
    path.write_text(_render(run, findings, pictures))
    return path


def draw_all(run: Run) -> list[Picture]:
    """Every picture that the trials allow."""
    with mpl.rc_context(STYLE):
        drawn = [draw(run) for draw in _PICTURES]
    return [picture for picture in drawn if picture is not None]


def _render(run: Run, findings: dict[str, list[Finding]], pictures: list[Picture]) -> str:
    """Fills the template; it gets text and numbers only, so that it calls nothing."""
    sweeps = [tables.sweep_table(run, decoupled=after) for after in (False, True)]
    methods = dict.fromkeys(row.method for row in run.part("main", "blocks"))
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
        metric_title=run.metric.missing_title,
        cards=[_card(run, pattern) for pattern in run.patterns("main")],
        about=_about(run.settings["task"]),
        methods={name_of(name): METHODS[name].what for name in methods},
        recipe=sentences.recipe_sentence(run),
        table=tables.main_table(run),
        shown=_shown(run.data.get("shown", {})),
        findings=findings,
        counts=Counter(at.seen for f in findings["main"] for at in f.at if at and f.source),
        scale=sentences.scale_sentence(run),
        pull=sentences.pull_sentences(run),
        sweeps=[sweep for sweep in sweeps if any(len(g) > 2 for g in sweep.groups.values())],
        blocks=tables.block_table(run),
        pictures={picture.name: (picture.source, picture) for picture in pictures},
    )


def _card(run: Run, pattern: str) -> dict[str, Any]:
    """The summary of one pattern: a bar for each method, and what explains the difference."""
    metric, rows = run.metric, run.part("main")
    missing = [metric.missing(row.numbers["metric"].mean) for row in rows]
    return {
        "pattern": pattern,
        "density": 100 * run.settings["density"][pattern],
        "bars": [
            {
                "name": name_of(row.method),
                "color": color_of(row.method),
                # The worst method of all patterns fills its bar, so that cards can be compared.
                "width": 100 * value / (max(missing) or 1.0),
                "text": f"{value:.{metric.digits - 1}f} {metric.unit}",
            }
            for row, value in zip(rows, missing, strict=True)
            if row.pattern == pattern
        ],
        "headline": sentences.headline(run, pattern),
        "reasons": sentences.reasons(run, pattern),
    }


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
        found.append({"texts": texts, "given": given, "is_drawn": is_drawn})
    return found


def _about(task: str) -> list[str]:
    """What the task's file says about it, by paragraphs, without how to run it.

    The file is read, not imported: the page needs none of the models that it imports.
    """
    path = Path(__file__).parents[1] / "tasks" / f"{task}.py"
    if not path.exists():  # The task is not one of this repository.
        return []
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return [" ".join(p.split()) for p in text.split("\n\n") if not p.startswith("Run:")]
