"""The runs of the ladder on a tiny task: what is tuned, what is tested, how it continues."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.ladder.__main__ import main
from experiments.ladder.rungs import BUDGET, RUNGS, Setting
from experiments.ladder.runs import Flags, Ladder
from experiments.tasks.options import DEFAULTS, offers
from experiments.training.loop import train
from experiments.training.methods import Strengths
from experiments.training.results import Results
from tests.experiments.tiny import tiny_task

# One network for both splits, as the tasks of the repository have it.
TASK = tiny_task(epochs=2, learning_rate=0.02)


@offers("perceptron", validation=True)
def task(options=DEFAULTS):
    """Both splits have the same steps; only the data differs."""
    if not options.validation:
        return TASK
    other = tiny_task(epochs=2, learning_rate=0.02)
    return dataclasses.replace(
        TASK,
        train_batches=lambda seed, epoch: other.train_batches(seed + 1000, epoch),
        identity=options.identity,
    )


NAME = f"{__name__}:task"
FLAGS = Flags(NAME, ("2:4",), ("sr_ste", "ste"), (7, 8), (1, 2, 3, 4, 5, 6))


def arguments(folder):
    flags = ["--task", NAME, "--patterns", "2:4", "--methods", "sr_ste", "ste"]
    return [str(folder), *flags, "--tuning-seeds", "7", "8", "--seeds", *"123456"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    assert main(arguments(folder)) == 0
    return folder


def trials(folder):
    return json.loads((folder / "results.json").read_text())["trials"]


def test_every_method_gets_the_same_budget():
    for rung in RUNGS.values():
        assert len(set(rung.settings)) == len(rung.settings) == BUDGET


def test_each_setting_is_tuned_and_the_best_one_is_tested_on_other_seeds(finished):
    found = trials(finished)
    for method in FLAGS.methods:
        tuning = [t for t in found if (t["method"], t["part"]) == (method, "tuning")]
        (tested,) = (t for t in found if (t["method"], t["part"]) == (method, "main"))
        assert [t["setting"] for t in tuning] == [s.title for s in RUNGS[method].settings]
        assert all(t["seeds"] == [7, 8] for t in tuning)
        assert tested["seeds"] == [1, 2, 3, 4, 5, 6]
        means = [np.mean(t["epochs"][-1]["test"]["accuracy"]) for t in tuning]
        assert tested["setting"] == tuning[int(np.argmax(means))]["setting"]


def test_settings_that_train_together_equal_each_alone(finished):
    made = Ladder(FLAGS)
    job = made.job("2:4", "sr_ste")
    for setting in (Setting(rate=2.0), Setting(pull=0.3)):
        strengths = made.strengths("2:4", "sr_ste", setting)
        assert strengths == Strengths(setting.pull * 0.01, setting.rate, setting.decay)
        *_, report = train(
            job._replace(task=made.tasks["tuning"]), seeds=(7, 8), lambda_w=strengths
        )
        (entry,) = (
            t
            for t in trials(finished)
            if (t["method"], t["part"], t["setting"]) == ("sr_ste", "tuning", setting.title)
        )
        np.testing.assert_allclose(
            entry["epochs"][-1]["test"]["loss"], report.test["loss"], rtol=1e-4
        )


def test_an_interrupted_ladder_continues_to_the_same_numbers(finished, tmp_path, monkeypatch):
    run, calls = Ladder.run, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        run(self, *args)

    monkeypatch.setattr(Ladder, "run", interrupted)
    assert main(arguments(tmp_path)) == 130
    assert len(trials(tmp_path)) == BUDGET + 1
    assert main(arguments(tmp_path)) == 0
    for one, other in zip(trials(tmp_path), trials(finished), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_the_table_shows_the_time_of_a_step(finished, capsys):
    assert main([str(finished)]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    titles = [cell.strip() for cell in header.strip("|").split("|")]
    rows = [
        dict(zip(titles, map(str.strip, line.strip("|").split("|")), strict=True)) for line in lines
    ]
    (reference,) = (row for row in rows if row["method"] == "sr_ste")
    assert reference["time"] == "1.00"
    assert all(float(row["time"]) > 0 for row in rows)


def test_a_setting_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    made = Ladder(dataclasses.replace(FLAGS, methods=("ste",)))
    results, settings = Results(tmp_path, made.settings, resume=False), RUNGS["ste"].settings
    own = made._train

    def fails(part, pattern, method, seeds, given, on_step):
        if any(strengths.rate == 2 for strengths in given):
            raise FloatingPointError("diverged")
        return own(part, pattern, method, seeds, given, on_step)

    monkeypatch.setattr(made, "_train", fails)
    made.run("tuning", "2:4", "ste", settings, results)
    assert [t["error"] for t in results.data["trials"]] == ["", "diverged", ""]
    assert made.choose(results, "2:4", "ste").rate == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": ("magic",)}, "no method named 'magic'"),
        ({"seeds": (7, 9)}, "occur twice"),
        ({"seeds": (9,)}, "two to test"),
    ],
)
def test_flags_that_make_no_sense_are_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FLAGS, **changed)


def test_methods_that_replace_adam_need_it():
    with pytest.raises(ValueError, match="cast needs Adam"):
        Ladder(dataclasses.replace(FLAGS, methods=("cast",)))
    assert "cast" not in Ladder(dataclasses.replace(FLAGS, methods=())).methods


def test_other_settings_need_another_folder(finished, capsys):
    assert main([*arguments(finished), "--seeds", "1", "2"]) == 1
    assert "Give another folder" in capsys.readouterr().err
