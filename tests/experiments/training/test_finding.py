"""Tasks are found by name, inside and outside of this repository."""

import json
import subprocess
import sys

import pytest

from experiments import compare, train
from experiments.training.finding import default_model, find_task, task_names
from experiments.training.flags import Flags

TASKS = "cifar10 coco detection digits flow flying_chairs imagenet2012 number_names python_bytes "
TASKS += "sintel wmt14"

# One file, and nothing else: a task of somebody else's.
OUTSIDE = """
import dataclasses

from experiments.tasks.options import DEFAULTS, Options, offers
from experiments.tasks.task import Compared
from tests.experiments.tiny import tiny_task

COMPARED = Compared(patterns=("1:4",), methods=("dense", "ste"), seeds=(0,))


@offers("thin", "thick")
def blobs(options: Options = DEFAULTS):
    width = {"thin": 8, "thick": 32}[options.model]
    made = tiny_task(width=width, epochs=options.epochs or 1)
    return dataclasses.replace(made, name="blobs", compared=COMPARED)


def plain(options):
    return tiny_task(epochs=1)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)
    return tmp_path


def test_the_tasks_there_are():
    assert task_names() == TASKS.split()
    for name in task_names():
        assert default_model(name)


def test_tasks_are_listed_without_importing_them():
    code = (
        "import sys; from experiments.training.finding import task_names; task_names(); "
        "print(*[name for name in sys.modules if name.startswith('experiments.tasks.')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # These two are not tasks.
    assert set(run.stdout.split()) == {"experiments.tasks.task", "experiments.tasks.learning_rates"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "digit",
            "no task named 'digit'; choose from cifar10, coco, .* wmt14. Name a task of",
        ),
        ("task", "no task named 'task'"),
        ("families", "no task named 'families'"),
        ("nowhere.tasks:blobs", "task 'nowhere.tasks:blobs': no module named 'nowhere'"),
        ("my_tasks:blob", "task 'my_tasks:blob': my_tasks has no function 'blob'"),
    ],
)
def test_an_unknown_task_is_an_error(outside, name, message, capsys):
    with pytest.raises(ValueError, match=message):
        find_task(name)
    for command in (train, compare):
        assert command.main(["--task", name, "--runs-dir", str(outside / "runs")]) == 1
        assert "error: " in capsys.readouterr().err


def test_what_a_task_fails_to_import_is_not_mistaken_for_the_task(outside):
    (outside / "broken_task.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        find_task("broken_task:task")


def test_a_task_from_outside_is_trained(outside, capsys):
    runs = outside / "runs"
    arguments = ["--task", "my_tasks:blobs", "--method", "ste", "--runs-dir", str(runs)]
    assert train.main(arguments) == 0
    (folder,) = runs.iterdir()
    assert folder.name == "my_tasks_blobs-thin-ste-2_4"
    assert json.loads((folder / "settings.json").read_text())["flags"]["model"] == "thin"
    assert "middle/kernel" in (folder / "plan.txt").read_text()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert train.main([*arguments, "--model", "wide"]) == 1
    assert "no model named 'wide'; choose from thin, thick" in capsys.readouterr().err


def test_a_task_from_outside_is_compared(outside, monkeypatch):
    monkeypatch.setattr(compare, "TIMED_STEPS", 1)
    runs = outside / "runs"
    arguments = ["--task", "my_tasks:blobs", "--model", "thick", "--runs-dir", str(runs)]
    assert compare.main(arguments) == 0
    data = json.loads((runs / "my_tasks_blobs" / "results.json").read_text())
    assert (data["settings"]["task"], data["settings"]["model"]) == ("blobs", "thick")
    assert [trial["method"] for trial in data["trials"]] == ["dense", "ste"]


def test_a_plain_function_is_a_task_without_a_choice_of_models(outside):
    assert default_model("my_tasks:plain") == ""
    assert Flags(task="my_tasks:plain").folder.name == "my_tasks_plain-sr_ste-2_4"
