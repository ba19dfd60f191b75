"""Metrics: how values and distances are shown."""

import numpy as np
import pytest

from experiments.tasks.task import Metric


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
