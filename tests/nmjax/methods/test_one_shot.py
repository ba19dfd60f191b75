"""One-shot pruning: when the mask is taken, and that it stays."""

import chex
import numpy as np
import pytest

import nmjax
from tests.nmjax.methods.cases import KEY, MASKS, PARAMS, PLAN, USER_MASKS, drift, gradient


def test_one_shot_keeps_its_first_mask():
    sparsifier = nmjax.one_shot(PLAN)
    state = sparsifier.init(PARAMS, KEY)
    chex.assert_trees_all_equal(dict(state.masks), MASKS)
    assert state.taken
    changed = drift(PARAMS, 5)
    assert nmjax.total_sad(MASKS, nmjax.compute_masks(changed, PLAN)) > 0
    for step in range(3):
        state = sparsifier.refresh(state, changed, step)
    chex.assert_trees_all_equal(dict(state.masks), MASKS)
    chex.assert_trees_all_equal(sparsifier.apply(changed, state), nmjax.prune(changed, PLAN, MASKS))


@pytest.mark.parametrize("steps", [range(8), [0, 2, 5, 6], [2, 4]], ids=str)
def test_one_shot_later_takes_the_mask_at_the_first_refresh_from_its_step_on(steps):
    sparsifier = nmjax.one_shot(PLAN, at_step=3)
    state = sparsifier.init(PARAMS, KEY)
    taken_at = next(step for step in steps if step >= 3)
    for step in steps:
        state = sparsifier.refresh(state, drift(PARAMS, step), step)
        if step < 3:
            assert not state.taken
            chex.assert_trees_all_equal(sparsifier.apply(PARAMS, state), PARAMS)
            assert nmjax.total_density(state.masks) == 1
    assert state.taken
    expected = nmjax.compute_masks(drift(PARAMS, taken_at), PLAN)
    chex.assert_trees_all_equal(dict(state.masks), expected)
    assert nmjax.total_sad(expected, MASKS) > 0  # so a mask taken too early would be noticed
    assert nmjax.total_density(state.masks) == 0.5


def test_one_shot_with_masks_keeps_the_callers():
    sparsifier = nmjax.one_shot(PLAN, masks=USER_MASKS)
    state = sparsifier.refresh(sparsifier.init(PARAMS, KEY), drift(PARAMS, 5), 7)
    chex.assert_trees_all_equal(dict(state.masks), USER_MASKS)
    pruned = nmjax.prune(PARAMS, PLAN, USER_MASKS)
    chex.assert_trees_all_equal(sparsifier.apply(PARAMS, state), pruned)


@pytest.mark.parametrize("masks", [None, USER_MASKS], ids=["computed", "given"])
def test_one_shot_gives_no_gradient_to_pruned_weights(masks):
    sparsifier = nmjax.one_shot(PLAN, masks=masks)
    grads = gradient(sparsifier, sparsifier.init(PARAMS, KEY))
    for name in "ab":
        expected = (masks or MASKS)[f"{name}/kernel"].astype(np.float32)
        np.testing.assert_array_equal(grads[name]["kernel"], expected)
    np.testing.assert_array_equal(grads["a"]["bias"], np.ones(4))


def test_one_shot_errors():
    with pytest.raises(ValueError, match=r"at_step counts .* got -1"):
        nmjax.one_shot(PLAN, at_step=-1)
    with pytest.raises(ValueError, match="at_step=3"):
        nmjax.one_shot(PLAN, at_step=3, masks=USER_MASKS)
    flipped = {**USER_MASKS, "a/kernel": np.ones((4, 8), bool)}
    with pytest.raises(ValueError, match=r"a/kernel.*\(4, 8\).*\(8, 4\)"):
        nmjax.one_shot(PLAN, masks=flipped).init(PARAMS, KEY)
    numbers = {**USER_MASKS, "a/kernel": np.ones((8, 4), np.int32)}
    with pytest.raises(TypeError, match=r"a/kernel.*int32"):
        nmjax.one_shot(PLAN, masks=numbers).init(PARAMS, KEY)
    with pytest.raises(ValueError, match=r"missing.*b/kernel"):
        nmjax.one_shot(PLAN, masks={"a/kernel": USER_MASKS["a/kernel"]}).init(PARAMS, KEY)
    with pytest.raises(ValueError, match="b/kernel: planned as"):
        nmjax.one_shot(PLAN).init({"a": PARAMS["a"]}, KEY)


def test_masks_of_a_trained_network_freeze_its_topology():
    """The masks that one run ended with are the next one's `masks=`."""
    trained = drift(PARAMS, 2)
    masks = nmjax.compute_masks(trained, PLAN)
    frozen = nmjax.one_shot(PLAN, masks=masks)
    state = frozen.init(trained, KEY)
    tuned = drift(trained, 3)
    chex.assert_trees_all_equal(frozen.apply(tuned, state), nmjax.prune(tuned, PLAN, masks))
