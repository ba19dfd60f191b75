"""What must stay the same for a run to go on."""

import dataclasses

import pytest

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
