"""Average precision of cases that can be counted by hand; masks pasted into images."""

import numpy as np
import pytest

from experiments.tasks.families.coco_metrics import Annotated, average_precision, paste


def image(boxes, classes, scores=None, masks=None, is_crowd=None):
    return Annotated(
        size=(40, 40),
        boxes=np.array(boxes, float).reshape(-1, 4),
        classes=np.array(classes, int),
        scores=None if scores is None else np.array(scores, float),
        masks=masks,
        is_crowd=is_crowd,
    )


A, B = [0, 0, 10, 10], [20, 20, 30, 40]


def test_the_truth_itself_is_perfect():
    found = average_precision([image([A, B], [1, 2])], [image([A, B], [1, 2], [0.9, 0.8])], "bbox")
    assert found == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1})


def test_overlap_decides_at_which_thresholds_a_box_counts():
    # An overlap of 0.8 counts from 0.5 to 0.8: seven of ten thresholds.
    found = average_precision([image([A], [1])], [image([[0, 0, 10, 8]], [1], [0.9])], "bbox")
    assert found == pytest.approx({"AP": 0.7, "AP50": 1, "AP75": 1}, abs=1e-6)


def test_the_wrong_class_and_nothing_at_all_are_worth_nothing():
    truth = [image([A], [1])]
    for found in ([image([A], [2], [0.9])], [image([], [], [])]):
        assert average_precision(truth, found, "bbox")["AP50"] == 0


def test_a_better_scored_false_alarm_halves_the_precision():
    truth = [image([A], [1]), image([], [])]
    found = [image([A], [1], [0.5]), image([B], [1], [0.9])]
    assert average_precision(truth, found, "bbox")["AP50"] == pytest.approx(0.5)
    found = [image([A], [1], [0.9]), image([B], [1], [0.5])]
    assert average_precision(truth, found, "bbox")["AP50"] == pytest.approx(1)


def test_a_missed_object_costs_recall():
    # Recall reaches one half: 51 of the 101 recall points.
    found = average_precision([image([A, B], [1, 1])], [image([A], [1], [0.9])], "bbox")
    assert found["AP50"] == pytest.approx(51 / 101)


def test_crowds_are_neither_rewarded_nor_punished():
    truth = [image([A, B], [1, 1], is_crowd=np.array([0, 1]))]
    found = [image([B, A], [1, 1], [0.9, 0.8])]
    assert average_precision(truth, found, "bbox")["AP50"] == pytest.approx(1)


def test_masks_are_compared_pixel_by_pixel():
    true = np.zeros((1, 40, 40), bool)
    true[0, :10, :10] = True
    half = true.copy()
    half[0, 6:] = False  # an overlap of 0.6: thresholds 0.5, 0.55, 0.6
    truth = [image([A], [1], masks=true)]
    whole = average_precision(truth, [image([A], [1], [0.9], masks=true)], "segm")
    assert whole["AP"] == pytest.approx(1)
    found = average_precision(truth, [image([A], [1], [0.9], masks=half)], "segm")
    assert found["AP"] == pytest.approx(0.3, abs=1e-6)
    with pytest.raises(ValueError, match="only boxes"):
        average_precision(truth, [image([A], [1], [0.9])], "segm")


def test_what_means_nothing_is_refused():
    with pytest.raises(ValueError, match="no image has a true object"):
        average_precision([image([], [])], [image([A], [1], [0.9])], "bbox")
    with pytest.raises(ValueError, match="2 images have annotations, but 1 have"):
        average_precision([image([A], [1])] * 2, [image([A], [1], [0.9])], "bbox")


def test_masks_are_pasted_where_their_boxes_are():
    probabilities = np.stack([np.ones((4, 4)), np.eye(2).repeat(2, 0).repeat(2, 1)])
    masks = paste(probabilities, np.array([[2, 3, 6, 5], [10, 10, 14, 14]]), (20, 16))
    expected = np.zeros((2, 20, 16), bool)
    expected[0, 3:5, 2:6] = True
    expected[1, 10:12, 10:12] = expected[1, 12:14, 12:14] = True
    np.testing.assert_array_equal(masks, expected)
    boxes = np.array([[2, 3, 6, 5], [10, 10, 14, 14]])
    coarse = paste(probabilities, boxes, (20, 16), stride=4)
    np.testing.assert_array_equal(coarse, expected[:, 2::4, 2::4])


def test_boxes_over_the_border_are_cut_off():
    boxes = np.array([[-4, -4, 2, 3], [14, 18, 30, 30], [5, 5, 5, 5], [40, 40, 50, 50]])
    masks = paste(np.ones((4, 2, 2)), boxes, (20, 16))
    assert masks[0].sum() == 2 * 3
    assert masks[0, :3, :2].all()
    assert masks[1].sum() == 2 * 2
    assert masks[2].sum() == 1
    assert not masks[3].any()
