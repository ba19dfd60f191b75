"""How metrics are shown, and what the loop reads of a task: from any step on, any rows."""

import dataclasses

import numpy as np
import pytest

from experiments.tasks.task import Metric
from tests.experiments.tiny import BATCH, STEPS, tiny_task


def test_accuracy_rises_and_is_shown_in_percent():
    metric = Metric()
    assert (metric.sign, metric.title, metric.digits) == (1, "accuracy %", 2)
    assert metric.missing(0.97) == pytest.approx(3)
    assert metric.missing_title == "error, 100 - accuracy %"


def test_a_metric_whose_best_value_is_zero_falls():
    metric = Metric("bits per byte", unit="", step="bits", perfect=0.0, scale=1.0)
    assert (metric.sign, metric.title, metric.digits) == (-1, "bits per byte", 3)
    np.testing.assert_allclose(metric.missing(np.array([2.5, 3.0])), [2.5, 3.0])
    assert metric.missing_title == "bits per byte"


def test_an_epoch_without_steps_is_refused():
    with pytest.raises(ValueError, match="task digits: steps_per_epoch must be at least 1, got 0"):
        dataclasses.replace(tiny_task(), steps_per_epoch=0)


@pytest.mark.parametrize("first_step", [0, 3, STEPS])
@pytest.mark.parametrize("rows", [np.arange(BATCH), np.array([2, 3, 5])])
def test_reading_from_the_middle_and_in_part(first_step, rows):
    task = tiny_task()
    expected = list(task.train_batches(7, 1))[first_step:]
    got = list(task.read(7, 1, first_step, rows))
    assert len(got) == STEPS - first_step
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values[rows])
    assert all(len(batch["label"]) == len(rows) for batch in got)


def test_a_task_that_reads_in_part_is_asked_to():
    asked = []

    def train_rows(**arguments):
        asked.append(arguments)
        return iter([])

    task = dataclasses.replace(tiny_task(), train_rows=train_rows)
    rows = np.arange(2, 6)
    assert list(task.read(7, 1, 3, rows)) == []
    assert asked == [{"seed": 7, "epoch": 1, "first_step": 3, "rows": rows}]


def test_the_test_set_is_read_in_part_and_filled_up():
    task, rows = tiny_task(), np.array([3, 30, 31, 32, 33])
    expected = list(task.eval_batches())
    for ours, theirs in zip(task.read_test(lambda size: rows), expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            assert ours[name].dtype == values.dtype
            np.testing.assert_array_equal(ours[name][:3], values[rows[:3]])
            assert not ours[name][3:].any()


def test_a_task_that_reads_the_test_set_in_part_is_asked_to():
    asked = []
    task = dataclasses.replace(tiny_task(), eval_rows=lambda rows_of: iter([asked.append(rows_of)]))
    assert list(task.read_test(np.arange)) == [None]
    assert asked == [np.arange]
