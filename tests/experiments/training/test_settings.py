"""What must stay the same for a run to go on."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.checkpointing.run_folder import open_folder
from experiments.training import settings
from experiments.training.flags import Flags
from experiments.training.methods import METHODS
from experiments.training.settings import check_alike, deciding, settings_of
from experiments.training.step import Job, plan_of
from tests.experiments.tiny import STEPS, tiny_task


def make_settings(vocabulary="32 pieces ab12", **flags):
    task = dataclasses.replace(tiny_task(), identity=(("vocabulary", vocabulary),))
    plan = plan_of(task, "2:4")
    job = Job(task, plan, METHODS["ste"].build(plan, task.recipe, STEPS))
    return settings_of(Flags(**flags), job)


def claim(folder, settings, earlier="resume"):
    open_folder(folder, settings, earlier=earlier, deciding=deciding)()


def test_a_run_with_another_vocabulary_is_not_resumed(tmp_path):
    claim(tmp_path / "a", make_settings())
    claim(tmp_path / "a", make_settings())
    with pytest.raises(ValueError, match="vocabulary is 32 pieces cd34, not 32 pieces ab12"):
        claim(tmp_path / "a", make_settings("32 pieces cd34"))


def test_only_changed_flags_are_named_and_not_what_follows_from_them(tmp_path):
    before = make_settings(epochs=12)
    before["recipe"] |= {"epochs": 12, "warmup_epochs": 0.5, "lambda_w": 1 / 3}
    now = make_settings(epochs=9)
    now["recipe"] |= {"epochs": 9, "warmup_epochs": 0.375, "lambda_w": 4 / 9}
    claim(tmp_path, before)
    with pytest.raises(ValueError, match=r"with other settings: epochs is 9, not 12\. Give the"):
        claim(tmp_path, now)
    # The same flags, but the task's recipe has changed.
    now["flags"] = before["flags"]
    with pytest.raises(ValueError, match=r"warmup_epochs is 0\.375, not 0\.5; lambda_w is"):
        claim(tmp_path, now)


@pytest.mark.parametrize("content", ["", '{"flags": {', "[]", '{"flags": {}}'])
def test_settings_that_were_cut_off_are_named_with_a_way_out(tmp_path, content):
    claim(tmp_path, make_settings())
    path = tmp_path / "settings.json"
    whole = json.loads(path.read_text())
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path} does not hold the settings .* delete the file"):
        claim(tmp_path, make_settings())
    path.unlink()
    claim(tmp_path, make_settings())
    again = json.loads(path.read_text())
    assert deciding(again) == deciding(whole)


def test_settings_stay_when_they_cannot_be_written_again(tmp_path, monkeypatch):
    claim(tmp_path, make_settings())
    before = (tmp_path / "settings.json").read_text()

    def cut_off(path, text, encoding):
        path.write_bytes(text.encode()[:9])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(OSError, match="disk full"):
        claim(tmp_path, make_settings())
    assert (tmp_path / "settings.json").read_text() == before


def as_process_0_among(monkeypatch, others):
    """Lets other processes say what this one does, changed by functions of the text."""
    monkeypatch.setattr(settings, "tell_all", lambda own: [own, *(other(own) for other in others)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("ab12", "cd34"), "vocabulary is 32 pieces cd34, not 32 pieces ab12"),
        (('steps_per_epoch": 5', 'steps_per_epoch": 6'), "steps_per_epoch is 6, not 5"),
        (('batch_size": 8', 'batch_size": 4'), "batch_size is 4, not 8"),
        ((', "vocabulary": "32 pieces ab12"', ""), "vocabulary is None, not 32 pieces ab12"),
    ],
)
def test_processes_with_other_data_are_refused(monkeypatch, change, message):
    own = make_settings()
    as_process_0_among(monkeypatch, [str, str])
    check_alike(own, STEPS)
    as_process_0_among(monkeypatch, [str, lambda own: own.replace(*change)])
    message = f"process 2 has other settings than process 0: {message}. Give all the same flags"
    with pytest.raises(ValueError, match=message):
        check_alike(own, STEPS)


def test_processes_may_differ_in_flags_of_their_own(tmp_path, monkeypatch):
    others = [str, lambda own: own.replace('"mesh": "data=5"', '"mesh": "data=6"')]
    as_process_0_among(monkeypatch, others)
    check_alike(make_settings(mesh="data=4"), STEPS)
    with pytest.raises(ValueError, match=r"process 2 has other settings .*: mesh is data=6, not"):
        check_alike(make_settings(mesh="data=5"), STEPS)
    said = []
    monkeypatch.setattr(settings, "tell_all", lambda own: said.append(own) or [own])
    for process in (0, 1):
        check_alike(make_settings(process=process, data_dir=tmp_path / str(process)), STEPS)
    assert said[0] == said[1]
