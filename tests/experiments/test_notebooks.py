"""The notebooks run from top to bottom and end in pictures."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def run(path, folder):
    """Executes a notebook, which may write files to the folder."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": folder}}
    nbclient.NotebookClient(notebook, timeout=1200, resources=resources).execute()
    return notebook


def outputs(notebook, kind):
    """Everything of one MIME type that the cells show."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.data[kind] for output in shown if kind in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.optimized  # It trains for thousands of steps.
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_pictures(path, tmp_path):
    notebook = run(path, tmp_path)
    assert len(outputs(notebook, "image/png")) >= 2
    assert any("<table>" in html for html in outputs(notebook, "text/html"))
    printed = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "equal to rounding: True" in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(outputs(notebook, "image/png")) >= 2
    kinds = {(o.output_type, o.get("name")) for cell in cells for o in cell.outputs}
    assert not kinds & {("error", None), ("stream", "stderr")}
    assert re.search(r"SR-STE +[\d.]+ ± [\d.]+ %", path.read_text())


def test_the_first_cell_installs_a_wheel_or_the_checkout(tmp_path, monkeypatch):
    notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    cell = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert cell.count("%pip install") == 1
    code = re.sub(r"%pip .*", "", cell)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = {}
    monkeypatch.chdir(FOLDER)
    exec(code, names)
    assert names["source"] == f"{FOLDER.parents[1]}[linen,plots,files]"
    wheel = tmp_path / "nmjax-0.1.0-py3-none-any.whl"
    wheel.touch()
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    assert names["source"] == f"{wheel}[linen,plots,files]"


def test_there_is_a_quickstart():
    assert FOLDER / "quickstart.ipynb" in NOTEBOOKS
