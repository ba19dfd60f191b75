"""Sequence loss and flow metrics against NumPy and cases counted by hand."""

import numpy as np
import pytest

from experiments.tasks.families.optical_flow import flow_sums, sequence_loss


def test_later_steps_weigh_more():
    rng = np.random.default_rng(0)
    flows = rng.standard_normal((3, 2, 4, 5, 2)).astype(np.float32)
    truth = rng.standard_normal((2, 4, 5, 2)).astype(np.float32)
    known = np.ones((2, 4, 5), np.float32)
    expected = sum(0.8 ** (2 - i) * np.abs(flows[i] - truth).mean() for i in range(3))
    assert float(sequence_loss(flows, truth, known)) == pytest.approx(expected, rel=1e-5)


def test_unknown_and_far_pixels_count_as_zero_whatever_they_hold():
    flows = np.zeros((1, 1, 2, 2, 2), np.float32)
    truth = np.ones((1, 2, 2, 2), np.float32)
    known = np.ones((1, 2, 2), np.float32)
    truth[0, 0, 0] = np.nan
    known[0, 0, 0] = 0
    truth[0, 0, 1] = (300, 300)  # 424 pixels
    # Two of four pixels are off by 1 in both components.
    assert float(sequence_loss(flows, truth, known)) == pytest.approx(0.5)


def sums(flow, truth, known=None, valid=None):
    flow, truth = np.asarray(flow, np.float32), np.asarray(truth, np.float32)
    known = np.ones(flow.shape[:-1]) if known is None else np.asarray(known)
    valid = np.ones(len(flow)) if valid is None else np.asarray(valid)
    return {name: float(value) for name, value in flow_sums(flow, truth, known, valid).items()}


def test_metrics_of_five_pixels_counted_by_hand():
    # Errors 0, 2, 4, 6 and 4; the last pixel moves 100, and 4 % off is no outlier.
    truth = [[[[0, 0], [0, 2], [4, 0], [0, 0], [100, 0]]]]
    flow = [[[[0, 0], [0, 0], [0, 0], [0, 6], [96, 0]]]]
    found = sums(flow, truth)
    assert found == pytest.approx(
        {
            "count": 1,
            "loss": 16 / 5,
            "EPE": 16 / 5,
            "over 1 px": 4 / 5,
            "over 3 px": 3 / 5,
            "over 5 px": 1 / 5,
            "outliers": 2 / 5,
        }
    )


def test_each_example_counts_once_and_padding_not_at_all():
    truth = np.zeros((3, 1, 2, 2))
    flow = np.zeros((3, 1, 2, 2))
    flow[0, 0, :, 0] = (2, 100)
    flow[1, 0, :, 0] = (1, 1)
    flow[2] = np.nan
    found = sums(flow, truth, known=[[[1, 0]], [[1, 1]], [[1, 1]]], valid=[1, 1, 0])
    assert found["count"] == 2
    assert found["EPE"] == pytest.approx(2 + 1)


def test_an_example_without_a_known_pixel_has_no_error():
    flow = np.full((1, 2, 2, 2), 7.0)
    found = sums(flow, np.full((1, 2, 2, 2), np.nan), known=np.zeros((1, 2, 2)))
    assert found["EPE"] == 0
