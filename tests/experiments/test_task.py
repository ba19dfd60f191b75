"""What the loop reads of a task: from any step on, any rows, whether the task helps or not."""

import dataclasses

import numpy as np
import pytest

from tests.experiments.tiny import BATCH, STEPS, tiny_task


@pytest.mark.parametrize("first_step", [0, 3, STEPS])
@pytest.mark.parametrize("rows", [slice(None), slice(2, 6)])
def test_reading_from_the_middle_and_in_part(first_step, rows):
    task = tiny_task()
    expected = list(task.train_batches(7, 1))[first_step:]
    got = list(task.read(7, 1, first_step, rows))
    assert len(got) == STEPS - first_step
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values[rows])
    assert all(len(batch["label"]) == len(range(BATCH)[rows]) for batch in got)


def test_a_task_that_reads_in_part_is_asked_to():
    asked = []

    def train_rows(**arguments):
        asked.append(arguments)
        return iter([])

    task = dataclasses.replace(tiny_task(), train_rows=train_rows)
    assert list(task.read(7, 1, 3, slice(2, 6))) == []
    assert asked == [{"seed": 7, "epoch": 1, "first_step": 3, "rows": slice(2, 6)}]
