"""Boxes against loops: overlap, coding, suppression, anchors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.models.detection.boxes import (
    area,
    clip,
    decode,
    encode,
    iou,
    pyramid_anchors,
    suppress,
)

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
suppress_jit = jax.jit(suppress, static_argnums=2)
iou_jit, encode_jit, decode_jit = jax.jit(iou), jax.jit(encode), jax.jit(decode)


def draw_boxes(rng, count, side=10):
    corner = rng.uniform(0, side, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(0.5, side, (count, 2))], 1).astype("f4")


def overlap(a, b):
    """Of two boxes, one number after the other."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def greedy(boxes, scores, threshold, groups):
    """From the best down: keep, and strike out what overlaps."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept = []
    for i in order:
        rivals = [j for j in kept if groups[i] == groups[j]]
        if scores[i] > -np.inf and all(overlap(boxes[i], boxes[j]) <= threshold for j in rivals):
            kept.append(i)
    return np.isin(np.arange(len(scores)), kept)


@settings(max_examples=20, deadline=None)
@given(sides=st.sampled_from([(1, 5), (4, 3)]), seed=st.integers(0, 999))
def test_overlap_of_every_pair(sides, seed):
    n, m = sides
    rng = np.random.default_rng(seed)
    first, second = draw_boxes(rng, n), draw_boxes(rng, m)
    expected = [[overlap(a, b) for b in second] for a in first]
    np.testing.assert_allclose(iou_jit(first, second), expected, rtol=1e-4, atol=1e-5)


def test_boxes_without_area_overlap_nothing():
    flat = np.array([[1, 1, 1, 5], [3, 3, 2, 2], [0, 0, 4, 4]], np.float32)
    np.testing.assert_array_equal(area(flat), [0, 0, 16])
    found = np.asarray(iou(flat, flat))
    assert found.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_coding_of_a_box_counted_by_hand():
    anchor, box = np.array([0.0, 0, 10, 20]), np.array([5.0, 10, 25, 20])
    # Centers (5, 10) and (15, 15), sides (10, 20) and (20, 10).
    expected = np.array([1, 0.25, np.log(2), np.log(0.5)]) * WEIGHTS
    np.testing.assert_allclose(encode(jnp.array(box), jnp.array(anchor), WEIGHTS), expected, 1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_decoding_is_the_inverse(seed):
    rng = np.random.default_rng(seed)
    boxes, anchors = jnp.array(draw_boxes(rng, 5)), jnp.array(draw_boxes(rng, 5))
    back = decode_jit(encode_jit(boxes, anchors, WEIGHTS), anchors, WEIGHTS)
    np.testing.assert_allclose(back, boxes, rtol=1e-3, atol=1e-3)


def test_decoding_stays_finite():
    anchor = jnp.array([0.0, 0, 16, 16])
    box = decode(jnp.array([0, 0, 1e6, 1e6]), anchor, (1, 1, 1, 1))
    np.testing.assert_allclose(box[2:] - box[:2], 1000, rtol=1e-4)


def test_clipping_keeps_width_and_height_apart():
    box = clip(jnp.array([-5.0, -5, 100, 100]), height=20, width=30)
    assert box.tolist() == [0, 0, 30, 20]


@settings(max_examples=40, deadline=None)
@given(
    threshold=st.sampled_from([0.1, 0.3, 0.5, 0.7]),
    with_groups=st.booleans(),
    padding=st.integers(0, 4),
    seed=st.integers(0, 9999),
)
def test_suppression_is_the_greedy_one(threshold, with_groups, padding, seed):
    rng = np.random.default_rng(seed)
    boxes = draw_boxes(rng, 14, side=6)
    # Few different scores, so that there are ties.
    scores = rng.integers(0, 6, 14).astype(np.float32)
    scores[rng.permutation(14)[:padding]] = -np.inf
    groups = rng.integers(0, 2, 14)
    found = suppress_jit(boxes, scores, threshold, groups if with_groups else np.zeros(14, int))
    expected = greedy(boxes, scores, threshold, groups if with_groups else np.zeros(14))
    np.testing.assert_array_equal(found, expected)


def test_a_chain_of_suppressions_is_settled():
    # Each box overlaps its neighbors only: every second one stays.
    left = np.arange(9.0)
    boxes = np.stack([left * 2, 0 * left, left * 2 + 3, 0 * left + 1], 1).astype(np.float32)
    stays = suppress(jnp.array(boxes), jnp.arange(9.0, 0, -1), 0.1)
    assert stays.tolist() == [True, False] * 4 + [True]


def test_suppression_under_vmap_is_that_of_each_image():
    rng = np.random.default_rng(0)
    boxes = np.stack([draw_boxes(rng, 12, side=5) for _ in range(3)])
    scores = rng.random((3, 12)).astype(np.float32)
    together = jax.jit(jax.vmap(lambda b, s: suppress(b, s, 0.3)))(boxes, scores)
    for one, b, s in zip(together, boxes, scores, strict=True):
        np.testing.assert_array_equal(one, greedy(b, s, 0.3, np.zeros(12)))


def test_anchors_of_two_levels():
    fine, coarse = pyramid_anchors([(4, 6), (2, 3)], (16, 24), sizes=(4, 8), ratios=(0.25, 1, 4))
    assert fine.shape == (4 * 6 * 3, 4)
    assert coarse.shape == (2 * 3 * 3, 4)
    anchors = fine.reshape(4, 6, 3, 4)
    for row, column in np.ndindex(4, 6):
        # height / width is 1/4, 1, 4; the area is 16; the stride is 4.
        for ratio, (width, height) in enumerate([(8, 2), (4, 4), (2, 8)]):
            x, y = 4 * column, 4 * row
            expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            assert anchors[row, column, ratio].tolist() == pytest.approx(expected)
    assert coarse.reshape(2, 3, 3, 4)[1, 2, 1].tolist() == [12, 4, 20, 12]
