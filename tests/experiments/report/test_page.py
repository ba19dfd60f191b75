"""The page from results: whole, partial, of other tasks; how it is put together."""

import copy
import graphlib
import html
import json
import re
import sys
from pathlib import Path

import pytest

from experiments.report import pictures
from experiments.report.numbers import Run
from experiments.report.page import draw_all, write_report
from experiments.report.sentences import headline, reasons
from experiments.report.tables import block_table, main_table, sweep_table

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "experiments" / "benchmarks" / "results"
# Results of comparisons, kept in the repository.
KEPT = ("python_bytes", "python_bytes_careful", "number_names", "detection", "flow")


def text_of(page):
    """The words of a page, without its pictures."""
    return " ".join(re.sub(r'base64,[^"]*', "", page).split())


def cells_of(table):
    return [cell for lines in table.groups.values() for line in lines for cell in line.cells]


def test_page_of_whole_results(run, whole):
    page = (whole / "report.html").read_text()
    for table in (main_table(run), block_table(run), sweep_table(run, decoupled=False)):
        for cell in cells_of(table):
            assert re.search(rf"{re.escape(html.escape(cell))}</t[dh]>", page)
    names = {"examples", "curves", "seeds", "layer_sad", "sad_over_time", "sweep", "shapes"}
    names |= {"block_curves", "block_changes", "block_masks", "balance"}
    assert {path.stem for path in whole.glob("*.svg")} == names
    assert page.count('<img src="data:image/svg+xml') == len(names)
    assert "&lt;b&gt;made up" in page
    assert "<b>made up" not in page
    words = text_of(page)
    # The captions' facts; every seed of each block method has the same rows.
    assert "At 1x8@0.75. Left: blocks kept" in words
    assert "Worst layers: 1xN b, balance 67%; SUBP a, balance 100%." in words
    assert "0 of 16 kernels are empty." in words
    assert "SUBP starts dense and reaches its density after 72% of the epochs." in words
    for pattern in ("2:4", "1:2"):
        for sentence in (headline(run, pattern), *reasons(run, pattern)):
            assert sentence in words


@pytest.mark.parametrize(
    "count", [0, 2, 11, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 9, 14, 18))]
)
def test_page_of_partial_results(data, tmp_path, count):
    partial = copy.deepcopy(data)
    partial["trials"] = partial["trials"][:count]
    for name in ("step_times", "shapes", "films", "examples"):
        del partial[name]
    page = write_report(partial, tmp_path).read_text()
    for section in ("summary", "run", "table", "paper", "sad", "strength", "machine"):
        assert f'<section id="{section}">' in page
    blocks = [t for t in partial["trials"] if t["part"] == "blocks"]
    # Each block pattern is set beside dense, and 1x4@0.5 beside SR-STE at 2:4 and 1:2.
    beside = {"1x4@0.5": 3, "1x8@0.75": 1}
    shown = len(blocks) + sum(beside[pattern] for pattern in {t["pattern"] for t in blocks})
    assert len(re.findall(r'<span class="dot"', page)) == min(count, 10) + shown
    assert ('<section id="blocks">' in page) == bool(blocks)


def test_recipe_size_and_pull_are_those_of_the_settings(data, tmp_path):
    data["trials"] = []
    words = text_of(write_report(data, tmp_path).read_text())
    assert "SGD with momentum 0.9, batch size 8" in words
    assert "follows a cosine to zero." in words
    assert "40 optimizer steps on a network of 500 parameters" in words
    assert "over all steps: 6.0 in the paper's" in words
    # The learning rates add up to 40 * 0.05.
    assert "In this run λ = 2e-4 adds up to 0.0004; SR-STE in the table uses 0.02" in words
    assert "0.02, which adds up to 0.04." in words
    data["settings"]["recipe"]["momentum"] = 0.5
    assert "by 2 here and by 10 there" in text_of(write_report(data, tmp_path).read_text())


def test_without_the_decoupled_method_adam_has_one_place_for_the_pull(bits, tmp_path):
    bits["trials"] = []
    words = text_of(write_report(bits, tmp_path).read_text())
    assert "Adam divides the gradient" in words
    assert "After the preconditioner" not in words


def test_the_page_of_a_metric_to_lower(bits, tmp_path):
    page = write_report(bits, tmp_path).read_text()
    words = text_of(page)
    assert "Without learning: chance 0.100 (bits per byte)." in words
    assert "AdamW with betas 0.9 and 0.98, gradients clipped to a norm of 1, batch size 8" in words
    assert "the inverse square root of the step" in words
    assert "Adam divides the gradient" in words
    assert "SR-STE in the table uses 0.02. After the preconditioner" in words
    assert "The table uses 0.1: learning rate * λ adds up to 0.2 over all steps" in words
    assert "The same sweep, with the pull after the preconditioner:" in words
    assert "layers stay dense" not in words
    assert "accuracy %" not in words
    best = re.findall(r'<tr class="best">\s*<th[^>]*><span[^>]*></span>([^<]*)', page)
    assert best == ["SR-STE", "SR-STE"]
    assert '<section id="shown">' in page
    assert words.count("<pre>def f(x):</pre>") == 1
    assert "<pre>&lt;i&gt;ste&lt;/i&gt;</pre>" in words


@pytest.mark.parametrize(
    "name", [KEPT[0], *(pytest.param(n, marks=pytest.mark.slow) for n in KEPT[1:])]
)
def test_kept_results_still_have_a_page(name, tmp_path):
    data = json.loads((RESULTS / f"{name}.json").read_text())
    words = text_of(write_report(data, tmp_path).read_text())
    for cell in cells_of(main_table(Run(data))):
        assert f"{cell}</td>" in words or f"{cell}</th>" in words
    assert "nan" not in words.lower().split()


def test_a_task_outside_of_the_folder_has_no_description(data, tmp_path):
    about, data["trials"] = "Handwritten digits", []
    assert about in write_report(data, tmp_path).read_text()
    for name in ("elsewhere", "a.b:c"):
        data["settings"]["task"] = name
        assert about not in write_report(data, tmp_path).read_text()


def test_the_page_does_not_import_the_task(data, tmp_path):
    """It reads the description of the task, which is cheaper than importing its models."""
    before = set(sys.modules)
    data["settings"]["task"], data["trials"] = "imagenet2012", []
    assert "ImageNet" in write_report(data, tmp_path).read_text()
    assert "experiments.tasks.imagenet2012" not in set(sys.modules) - before


def test_calls_only_go_down(data, tmp_path, monkeypatch):
    """No file calls back into one that called it, and the template calls nothing of ours."""
    calls, ours = set(), str(ROOT / "experiments")
    # Drawing is slow while every call is watched, and calls nothing of ours.
    monkeypatch.setattr(pictures, "_as_svg", lambda *arguments: b"<svg/>")

    def watch(frame, event, _):
        # Runs for every call that matplotlib makes, so it compares text and makes no paths.
        if event != "call" or not frame.f_code.co_filename.startswith(ours):
            return
        # Code that the template is compiled to has the template's name.
        caller = frame.f_back.f_code.co_filename
        if caller.startswith(ours):
            calls.add((Path(caller).name, Path(frame.f_code.co_filename).name))

    sys.setprofile(watch)
    try:
        write_report(data, tmp_path)
    finally:
        sys.setprofile(None)
    assert ("page.py", "claims.py") in calls
    graph = {}
    for caller, called in calls:
        if caller != called:
            graph.setdefault(caller, set()).add(called)
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) > 5
    assert "page.html.jinja" not in graph


@pytest.mark.slow
def test_pictures_are_the_same_for_the_same_results(data):
    first, second = draw_all(Run(data)), draw_all(Run(data))
    assert first == second


def test_a_stopped_trial_is_named_and_left_out_of_the_table(data, tmp_path):
    data["trials"][3]["error"] = "the loss of seed 0 is not finite"
    assert len(Run(data).part("main")) == 9
    assert "is not finite" in write_report(data, tmp_path).read_text()


def test_what_networks_do_is_shown_as_text_or_as_pictures(data, tmp_path):
    uri = "data:image/jpeg;base64,"
    data["shown"] = {
        "2:4 dense": [
            {"said": "one", "network": "two"},
            {"truth": uri + "AA", "network": uri + "BB"},
        ],
        "2:4 sr_ste, lambda_w 0.02": [
            {"said": "one", "network": "three"},
            {"truth": uri + "AA", "network": uri + "CC"},
        ],
    }
    page = write_report(data, tmp_path).read_text()
    assert "<pre>three</pre>" in page
    for name, content in (("truth", "AA"), ("2:4 dense", "BB"), ("2:4 SR-STE", "CC")):
        assert f'<img src="{uri}{content}" alt="{name}">' in page
