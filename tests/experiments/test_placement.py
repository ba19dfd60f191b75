"""Where batches and states lie, on eight simulated devices."""

import jax
import numpy as np
import pytest

from experiments.placement import make_placement

BATCH = {"image": np.arange(24.0).reshape(12, 2), "label": np.arange(12)}


def test_one_cpu_is_the_default_and_leaves_everything_where_it_is():
    placement = make_placement(None, seeds=1, batch_size=7)
    assert placement.over_seeds is None
    assert placement.put_batch(BATCH) is BATCH
    assert make_placement(None, seeds=3, batch_size=7).over_seeds is not None


def test_each_device_has_a_share_of_the_batch_and_the_whole_state():
    placement = make_placement(4, seeds=1, batch_size=12)
    batch = placement.put_batch(BATCH)
    shards = batch["image"].addressable_shards
    assert [shard.data.shape for shard in shards] == [(3, 2)] * 4
    np.testing.assert_array_equal(batch["image"], BATCH["image"])
    state = placement.put_state({"w": np.ones((8, 8))})
    assert [shard.data.shape for shard in state["w"].addressable_shards] == [(8, 8)] * 4


def test_the_axis_of_seeds_is_not_split():
    placement = make_placement(4, seeds=2, batch_size=12)
    batch = placement.put_batch({name: np.stack([a, a]) for name, a in BATCH.items()})
    assert {shard.data.shape for shard in batch["label"].addressable_shards} == {(2, 3)}
    assert placement.over_seeds is jax.vmap


def test_an_evaluation_batch_that_does_not_split_is_copied():
    batch = make_placement(8, seeds=1, batch_size=16).put_batch(BATCH)
    assert {shard.data.shape for shard in batch["label"].addressable_shards} == {(12,)}


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, "devices must be from 1 to the 8 there are, got 0"),
        (9, "devices must be from 1 to the 8 there are, got 9"),
        (8, "a batch of 12 does not split evenly over 8 devices"),
    ],
)
def test_impossible_numbers_of_devices(devices, message):
    with pytest.raises(ValueError, match=message):
        make_placement(devices, seeds=1, batch_size=12)
