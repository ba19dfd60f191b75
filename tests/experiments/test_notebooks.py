"""The notebooks run from top to bottom and end in pictures."""

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
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    return notebook


def outputs(notebook, kind):
    """Everything of one MIME type that the cells show."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.data[kind] for output in shown if kind in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_pictures(path, tmp_path):
    notebook = run(path, tmp_path)
    assert len(outputs(notebook, "image/png")) >= 2
    assert any("<table>" in html for html in outputs(notebook, "text/html"))
    printed = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "equal to rounding: True" in printed


def test_there_is_a_quickstart():
    assert FOLDER / "quickstart.ipynb" in NOTEBOOKS
