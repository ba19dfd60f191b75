"""The README and the pages in docs: their code runs, and what they point to exists."""

import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import nmjax
from nmjax import methods
from nmjax.__main__ import _COMMANDS, main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
METHODS = sorted((ROOT / "docs" / "methods").glob("*.md"))
METHOD_PAGES = [page for page in METHODS if page.stem != "index"]
OTHERS = [CONTRIBUTING, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [README, ROOT / "CHANGELOG.md", *OTHERS, *METHODS]
WITH_CODE = [README, ROOT / "docs" / "guide.md", ROOT / "docs" / "serving.md", *METHOD_PAGES]
# Each compiles a training step; the README and the guide show the usual ones.
CODE = [pytest.param(p, marks=[pytest.mark.slow] * (p in METHOD_PAGES)) for p in WITH_CODE]

TOCTREE = re.findall(r"^([\w/]+)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
API = ROOT / "docs/api"
GUIDES = sorted((ROOT / "docs/guides").glob("*.ipynb"))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def name(page):
    return str(page.relative_to(ROOT))


def test_pages_with_code_are_known():
    assert [page for page in PAGES if blocks(page, "python")] == WITH_CODE


@pytest.mark.parametrize("page", CODE, ids=name)
def test_python_code_runs_and_prints_what_its_comments_show(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # It writes a file.
    names = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, name(page), "exec"), names)
        shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        for comment in re.findall(r"^print.*\n((?:#.*\n)+)", block, re.MULTILINE):
            expected = [line.removeprefix("#").removeprefix(" ") for line in comment.splitlines()]
            assert shown == expected


def test_every_method_has_a_page():
    names = {"straight_through", "mvue"} | {
        n for n in methods.__all__ if inspect.isfunction(getattr(methods, n))
    }
    helpers = ("_ramp", "_scale", "_weights", "_matmul", "_rate", "_24", "tickets_of", "ensemble")
    assert {p.stem for p in METHOD_PAGES} == {n for n in names if not n.endswith(helpers)} - {
        "dense"
    }


def test_the_readme_shows_the_table_of_a_plan():
    assert any("print(plan)\n# leaf " in block for block in blocks(README, "python"))


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    for link in links:
        if not link.startswith("https://"):
            assert (page.parent / link).exists(), link


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {README}
    while new:
        reached |= new
        links = {
            (page.parent / link).resolve()
            for page in new
            for link in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
        }
        links |= {
            ROOT / "docs" / f"{entry}.md" for entry in TOCTREE if ROOT / "docs/index.md" in new
        }
        new = links - reached
    assert set(PAGES) <= reached


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page):
    text = "\n".join(blocks(page, "bash"))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) <= set(targets)
    for module in re.findall(r"python -m ([\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    tasks = {path.stem for path in (ROOT / "experiments/tasks").glob("*.py")}
    assert set(re.findall(r"--task (\w+)", text)) <= tasks


def test_the_commands_of_nmjax_take_the_options_in_the_guide(monkeypatch):
    commands = re.findall(r"^python -m nmjax (.*)", "\n".join(blocks(WITH_CODE[1], "bash")), re.M)
    called = []
    for command in ("info", "plan", "prune", "pack", "bench"):
        monkeypatch.setitem(_COMMANDS, command, lambda arguments: called.append(1))
    assert [main(command.split()) for command in commands] == [0] * 5
    assert len(called) == 5


MOVED = re.findall(
    r"^\| `([\w.]+)`(?: \(module\))? \| `([\w.]+)` \|$",
    (ROOT / "CHANGELOG.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize(("before", "now"), MOVED)
def test_what_moved_is_where_the_changelog_says(before, now):
    assert before != now
    assert pkgutil.resolve_name(now)


def test_the_changelog_lists_moved_names():
    assert len(MOVED) >= 50


@pytest.mark.parametrize("module", ["nmjax", "linen", "nnx", "methods", "post_training", "kernels"])
def test_every_public_name_has_a_page(module):
    module = nmjax if module == "nmjax" else importlib.import_module(f"nmjax.{module}")
    text = (API / f"{module.__name__.split('.')[-1]}.md").read_text()
    assert re.search(rf"currentmodule:: {module.__name__}$", text, re.MULTILINE)
    listed = re.findall(r"^   (\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(module.__all__)


def test_the_page_of_files_names_what_exists():
    listed = re.findall(r"^   ([\w.]+)$", (API / "files.md").read_text(), re.MULTILINE)
    assert listed
    assert all(pkgutil.resolve_name(f"nmjax.{entry}") for entry in listed)


def test_contributing_names_files_that_exist():
    paths = re.findall(r"`((?:nmjax|tests|experiments|docs)/[^`\s]*)`", CONTRIBUTING.read_text())
    assert len(paths) > 5
    for path in paths:
        assert (ROOT / path).exists() or path == "docs/_build/html", path


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_guides_are_stored_with_their_outputs(guide):
    cells = [cell for cell in json.loads(guide.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_guides_run(guide, tmp_path):
    notebook = nbformat.read(guide, as_version=4)
    resources = {"metadata": {"path": tmp_path}}
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute()
