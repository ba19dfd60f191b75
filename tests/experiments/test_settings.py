"""What must stay the same for a run to go on."""

import dataclasses

import pytest

from experiments import settings
from experiments.flags import Flags
from experiments.methods import METHODS
from experiments.placement import HERE
from experiments.settings import claim_folder
from experiments.step import Job, plan_of
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
