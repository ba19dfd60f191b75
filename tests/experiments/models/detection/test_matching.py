"""Matching and sampling of candidates, by hand and by counting."""

import jax
import numpy as np
import pytest

from experiments.models.detection.matching import Match, match, sample

OBJECTS = np.array([[0, 0, 10, 10], [20, 20, 24, 24], [0, 0, 0, 0]], np.float32)
THERE = np.array([True, True, False])
CANDIDATES = np.array(
    [
        [0, 0, 10, 10],  # the first object itself
        [0, 0, 10, 6],  # 0.6 of it
        [0, 0, 10, 4],  # 0.4 of it
        [0, 0, 10, 1],  # 0.1 of it
        [18, 18, 26, 26],  # 0.25 of the second object, its best
        [50, 50, 60, 60],  # nothing
        [0, 0, 0, 0],  # as empty as the padding
    ],
    np.float32,
)


def test_candidates_by_hand():
    found = match(CANDIDATES, OBJECTS, THERE, above=0.5, below=0.3)
    assert found.is_object.tolist() == [True, True] + [False] * 5
    assert found.is_background.tolist() == [False, False, False, True, True, True, True]
    assert found.object[:4].tolist() == [0] * 4
    assert found.object[4] == 1


def test_the_best_candidate_of_an_object_shows_it():
    found = match(CANDIDATES, OBJECTS, THERE, above=0.7, below=0.3, keep_best=True)
    assert found.is_object.tolist() == [True, False, False, False, True, False, False]
    assert not (found.is_object & found.is_background).any()


def test_an_image_without_objects_is_all_background():
    for keep_best in (False, True):
        nothing = np.zeros(3, bool)
        found = match(CANDIDATES, OBJECTS, nothing, above=0.5, below=0.3, keep_best=keep_best)
        assert not found.is_object.any()
        assert found.is_background.all()


@pytest.mark.parametrize(
    ("objects", "background", "expected"),
    [(20, 60, (4, 12)), (2, 60, (2, 14)), (0, 60, (0, 16)), (20, 5, (4, 5)), (0, 0, (0, 0))],
)
def test_as_many_are_drawn_as_there_are(objects, background, expected):
    kinds = np.repeat([0, 1, 2], [objects, background, 10])
    found = Match(np.zeros(len(kinds), int), kinds == 0, kinds == 1)
    drawn = sample(jax.random.key(0), found, count=16, share=0.25)
    assert (int(drawn[0].sum()), int(drawn[1].sum())) == expected
    assert not (drawn[0] & ~found.is_object).any()
    assert not (drawn[1] & ~found.is_background).any()


def test_other_keys_draw_others_and_every_one_can_be_drawn():
    found = Match(np.zeros(12, int), np.arange(12) < 6, np.arange(12) >= 6)
    draw = jax.vmap(lambda key: sample(key, found, count=4, share=0.5))
    objects, background = draw(jax.random.split(jax.random.key(0), 64))
    assert objects.sum(axis=0)[:6].min() > 0
    assert background.sum(axis=0)[6:].min() > 0
