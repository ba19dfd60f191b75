"""What must stay the same for a run to go on."""

import dataclasses

import pytest

from experiments.distributed.placement import HERE
from experiments.training import settings
from experiments.training.flags import Flags
from experiments.training.methods import METHODS
from experiments.training.settings import check_alike, check_same_task, claim_folder
from experiments.training.step import Job, plan_of
from tests.experiments.tiny import STEPS, tiny_task


def make_job(vocabulary):
    task = dataclasses.replace(tiny_task(), identity=(("vocabulary", vocabulary),))
    plan = plan_of(task, "2:4")
    return Job(task, plan, METHODS["ste"].build(plan, task.recipe, STEPS))


def test_a_run_with_another_vocabulary_is_not_resumed(tmp_path):
    flags = Flags(runs_dir=tmp_path, name="a", resume=True)
    claim_folder(flags, make_job("32 pieces ab12"), HERE)
    claim_folder(flags, make_job("32 pieces ab12"), HERE)
    with pytest.raises(ValueError, match="vocabulary was 32 pieces ab12, now 32 pieces cd34"):
        claim_folder(flags, make_job("32 pieces cd34"), HERE)


@pytest.mark.parametrize("content", ["", '{"flags": {', "[]", '{"flags": {}}'])
def test_settings_that_were_cut_off_are_named_with_a_way_out(tmp_path, content):
    flags = Flags(runs_dir=tmp_path, name="a", resume=True)
    claim_folder(flags, make_job("32 pieces ab12"), HERE)
    path = tmp_path / "a" / "settings.json"
    whole = path.read_text()
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path} does not hold the settings .* delete the file"):
        claim_folder(flags, make_job("32 pieces ab12"), HERE)
    path.unlink()
    claim_folder(flags, make_job("32 pieces ab12"), HERE)
    assert path.read_text() == whole


def test_settings_stay_when_they_cannot_be_written_again(tmp_path, monkeypatch):
    flags = Flags(runs_dir=tmp_path, name="a", resume=True)
    claim_folder(flags, make_job("32 pieces ab12"), HERE)
    before = (tmp_path / "a" / "settings.json").read_text()

    def cut_off(path, text):
        path.write_bytes(text.encode()[:9])
        raise OSError("disk full")

    monkeypatch.setattr(settings.Path, "write_text", cut_off)
    with pytest.raises(OSError, match="disk full"):
        claim_folder(flags, make_job("32 pieces ab12"), HERE)
    assert (tmp_path / "a" / "settings.json").read_text() == before


def as_process_0_among(monkeypatch, others):
    """Lets other processes say what this one does, changed by functions of the text."""
    monkeypatch.setattr(settings, "tell_all", lambda own: [own, *(other(own) for other in others)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("ab12", "cd34"), "vocabulary 32 pieces cd34, not vocabulary 32 pieces ab12"),
        (("steps_per_epoch 5", "steps_per_epoch 6"), "steps_per_epoch 6, not steps_per_epoch 5"),
        (("batch_size 8", "batch_size 4"), "batch_size 4, not batch_size 8"),
        (("\nvocabulary 32 pieces ab12", ""), "nothing, not vocabulary 32 pieces ab12"),
    ],
)
def test_processes_with_other_data_are_refused(monkeypatch, change, message):
    task = make_job("32 pieces ab12").task
    as_process_0_among(monkeypatch, [str, str])
    check_same_task(task)
    as_process_0_among(monkeypatch, [str, lambda own: own.replace(*change)])
    message = f"process 2 has another task digits than process 0: {message}. Give all the same data"
    with pytest.raises(ValueError, match=message):
        check_same_task(task)


def test_processes_may_differ_in_flags_of_their_own(tmp_path, monkeypatch):
    others = [lambda own: own, lambda own: own.replace("epochs 5", "epochs 6")]
    as_process_0_among(monkeypatch, others)
    check_alike(Flags(epochs=4))
    with pytest.raises(ValueError, match=r"process 2 .* other flags .*: epochs 6, not epochs 5\."):
        check_alike(Flags(epochs=5))
    said = []
    monkeypatch.setattr(settings, "tell_all", lambda own: said.append(own) or [own])
    for process in (0, 1):
        check_alike(Flags(process=process, data_dir=tmp_path / str(process)))
    assert said[0] == said[1]
