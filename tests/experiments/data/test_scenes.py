"""Scenes: annotations that are exact, deterministic, and of other digits in training and test."""

import itertools

import numpy as np
import pytest

from experiments.data import scenes as module
from experiments.data.scenes import CLASSES, DARKENED, MOST_OBJECTS, box_of, draw_scene, load_digits


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [draw_scene(rng, 64, "train") for _ in range(60)]


def test_boxes_are_those_of_the_masks(scenes):
    for scene in scenes:
        for box, number, mask in zip(scene.boxes, scene.classes, scene.masks, strict=True):
            if number == 0:
                assert (box == 0).all()
                assert (mask == 0).all()
                continue
            left, top, right, bottom = box.astype(int)
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 64
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
            assert mask[top].any()
            assert mask[bottom - 1].any()
            assert mask[:, left].any()
            assert mask[:, right - 1].any()


def test_masks_do_not_overlap_and_have_one_tint(scenes):
    for scene in scenes:
        assert scene.masks.sum(axis=0).max() <= 1
        for mask in scene.masks[scene.classes > 0]:
            assert np.ptp(scene.image[mask > 0], axis=0).max() == 0


def test_whatever_is_lighter_than_the_photograph_is_annotated(scenes):
    for scene in scenes:
        drawn = (scene.image > DARKENED).all(axis=-1)
        np.testing.assert_array_equal(drawn, scene.masks.any(axis=0))


def test_padding_comes_last_and_every_class_and_count_occurs(scenes):
    counts = [int((scene.classes > 0).sum()) for scene in scenes]
    for scene, count in zip(scenes, counts, strict=True):
        assert (scene.classes[:count] > 0).all()
        assert scene.image.dtype == np.float32
        assert 0 <= scene.image.min() <= scene.image.max() <= 1
    assert set(counts) == set(range(MOST_OBJECTS + 1))
    assert set(np.concatenate([s.classes for s in scenes])) == set(range(CLASSES))


@pytest.mark.parametrize(("hidden", "most"), [(2, 2), (3, 1), (10, 1)])
def test_a_digit_that_hides_more_than_a_quarter_of_another_is_left_out(monkeypatch, hidden, most):
    places = np.zeros((2, 64, 64), bool)
    places[0, :10, 20:30] = True
    places[1, :10, 10 + hidden : 20 + hidden] = True
    turns = itertools.cycle(places)
    monkeypatch.setattr(module, "_place", lambda *_: next(turns))
    drawn = [draw_scene(np.random.default_rng(seed), 64, "train") for seed in range(20)]
    counts = [int((scene.classes > 0).sum()) for scene in drawn]
    assert max(counts) == most
    areas = {int(scene.masks[0].sum()) for scene, n in zip(drawn, counts, strict=True) if n == most}
    assert areas == {100 - 10 * hidden if most == 2 else 100}


def test_the_same_generator_gives_the_same_scene():
    one, two = (draw_scene(np.random.default_rng((1, 2)), 64, "test") for _ in range(2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_classes_are_digits_and_ten_for_zero(monkeypatch):
    digits = np.ones((3, 8, 8))
    for label, number in ((0, 10), (1, 1), (9, 9)):
        monkeypatch.setattr(module, "load_digits", lambda _, n=label: (digits, np.full(3, n)))
        scene = draw_scene(np.random.default_rng(3), 64, "train")
        assert set(scene.classes[scene.classes > 0]) == {number}


def test_digits_are_split():
    train, test = load_digits("train"), load_digits("test")
    assert len(train[1]) + len(test[1]) == 1797
    assert len(train[1]) == pytest.approx(0.7 * 1797, abs=1)
    assert set(train[1]) == set(test[1]) == set(range(10))


def test_a_box_covers_its_mask():
    mask = np.zeros((5, 6), bool)
    mask[1, 4] = mask[3, 2] = True
    assert box_of(mask) == (2, 1, 5, 4)
