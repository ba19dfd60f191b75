"""The README and the pages in docs: their code runs, and what they point to exists."""

import pkgutil
import re
from pathlib import Path

import pytest

from nmjax.__main__ import _COMMANDS, main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [README, ROOT / "docs" / "guide.md", ROOT / "docs" / "serving.md"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def name(page):
    return str(page.relative_to(ROOT))


def test_pages_with_code_are_known():
    assert [page for page in PAGES if blocks(page, "python")] == WITH_CODE


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_python_code_runs_and_prints_what_its_comments_show(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # It writes a file.
    names = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, name(page), "exec"), names)
        shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        for comment in re.findall(r"^print.*\n((?:#.*\n)+)", block, re.MULTILINE):
            expected = [line.removeprefix("#").removeprefix(" ") for line in comment.splitlines()]
            assert shown == expected


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
