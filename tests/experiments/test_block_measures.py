"""Blocks kept and regrown, against loops over the blocks."""

import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from experiments.block_measures import block_flags, block_measures

SHAPES = {"conv": (3, 3, 6, 8), "dense": (10, 4)}


@pytest.fixture
def plan():
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in SHAPES.items()}
    return nmjax.make_plan(params, "1x4@0.5")


def random_masks(seed):
    """Masks whose blocks of 4 outputs stay or go at random, and the flags they were made of."""
    rng, masks, flags = np.random.default_rng(seed), {}, {}
    for name, shape in SHAPES.items():
        *taps, inputs, outputs = shape
        kept = rng.random((outputs // 4, inputs)) < 0.5
        mask = np.zeros(shape, bool)
        for row in range(outputs // 4):
            for i in range(inputs):
                mask[..., i, 4 * row : 4 * row + 4] = kept[row, i]
        masks[f"{name}/kernel"], flags[f"{name}/kernel"] = jnp.array(mask), kept
        del taps
    return masks, flags


def test_flags_are_those_the_masks_were_made_of(plan):
    masks, flags = random_masks(0)
    found = block_flags(plan, masks)
    assert found.keys() == flags.keys()
    for name, kept in flags.items():
        np.testing.assert_array_equal(found[name], kept)


@pytest.mark.parametrize("seed", range(3))
def test_measures_equal_counts_by_hand(plan, seed):
    (before, old), (after, new) = random_masks(seed), random_masks(seed + 10)
    measured = block_measures(plan, before, after)
    regrown = sum(int((new[name] & ~old[name]).sum()) for name in new)
    entries = {"conv/kernel": 4 * 9, "dense/kernel": 4}
    changed = sum(int((new[name] != old[name]).sum()) * entries[name] for name in new)
    assert measured["regrown"] == regrown
    assert measured["sad"] == changed
    for name, kept in new.items():
        np.testing.assert_array_equal(measured["kept_rows"][name], kept.sum(axis=1))
