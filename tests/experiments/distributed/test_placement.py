"""Where batches and states lie, on eight simulated devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import nmjax
from experiments.distributed.placement import HERE, Placement, make_placement

BATCH = {"image": np.arange(24.0).reshape(12, 2), "label": np.arange(12)}
PARAMS = {"a": {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32)}}
PLAN = nmjax.make_plan(PARAMS, "2:4")


def place(batch_size, **options):
    return make_placement(PARAMS, PLAN, batch_size=batch_size, **options)


def test_one_cpu_is_the_default_and_leaves_everything_where_it_is():
    placement = place(7)
    assert placement.over_seeds is None
    assert placement.layout is None
    for here in (placement, HERE):
        assert here.put(BATCH) is BATCH
        assert here.like(PARAMS) is PARAMS
        assert here.rows_of(7).tolist() == list(range(7))
    assert place(7, seeds=3).over_seeds is not None


def test_each_device_has_a_share_of_the_batch_and_the_whole_state():
    placement = place(12, devices=4)
    assert placement.rows_of(12).tolist() == list(range(12))
    batch = placement.put(BATCH)
    assert [shard.data.shape for shard in batch["image"].addressable_shards] == [(3, 2)] * 4
    np.testing.assert_array_equal(batch["image"], BATCH["image"])
    (leaf,) = jax.tree.leaves(placement.like(PARAMS))
    assert leaf.sharding.is_fully_replicated
    assert len(leaf.sharding.device_set) == 4


def test_a_mesh_of_several_axes_splits_batches_over_the_first_or_those_named():
    mesh = {"mesh": "data=2,model=4"}
    batch = place(16, **mesh).put(BATCH)
    assert {shard.data.shape for shard in batch["label"].addressable_shards} == {(6,)}
    batch = place(16, **mesh, batch_axes=("model",)).put(BATCH)
    assert {shard.data.shape for shard in batch["label"].addressable_shards} == {(3,)}
    placement = place(16, **mesh, batch_axes=("data", "model"), preset="fsdp")
    assert placement.layout.batch_shards == 8
    assert placement.layout.sharding("x/a/kernel", (16, 8)).shard_shape((16, 8)) == (16, 1)


def test_the_axis_of_seeds_is_not_split():
    placement = place(12, devices=4, seeds=2)
    batch = placement.put({name: np.stack([a, a]) for name, a in BATCH.items()})
    assert {shard.data.shape for shard in batch["label"].addressable_shards} == {(2, 3)}
    assert placement.over_seeds is jax.vmap


@pytest.mark.parametrize("options", [{"devices": 8}, {"mesh": "a=2,b=4", "batch_axes": ("b", "a")}])
def test_a_batch_that_does_not_split_is_filled_up(options):
    placement = place(16, **options)
    assert placement.rows_of(12).tolist() == list(range(16))
    rows = {name: np.resize(a, (16, *a.shape[1:])) for name, a in BATCH.items()}
    batch = placement.put(rows)
    assert {shard.data.shape for shard in batch["label"].addressable_shards} == {(2,)}
    for name, values in rows.items():
        np.testing.assert_array_equal(batch[name], values)


@pytest.mark.parametrize(
    ("own", "expected"), [((1, 2), [3, 4, 5, 6, 7, 8]), ((0, 3), [0, 1, 2, 9, 10, 11])]
)
def test_a_process_needs_the_rows_of_its_devices(own, expected):
    """Ten rows in four shards of three; a mesh may give a process shards that are not neighbors."""
    placement = Placement(layout=SimpleNamespace(batch_shards=4, own_batch_shards=own))
    assert placement.rows_of(10).tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 0}, "devices must be from 1 to 8, got 0"),
        ({"devices": 9}, "devices must be from 1 to 8, got 9"),
        ({"devices": 8}, "a batch of 12 does not split evenly over 8 devices"),
        ({"devices": 4, "accumulate": 2}, "a batch of 12 in 2 parts does not split evenly over 4"),
        (
            {"mesh": "a=2,b=4", "batch_axes": ("b", "a")},
            "along b=4 and a=2: give .* that 8 divides",
        ),
        ({"accumulate": 5}, "a batch of 12 does not split evenly into 5 parts"),
        ({"mesh": "data=3"}, "has 3 devices, which does not divide the 8 present"),
        ({"mesh": "data=4", "devices": 4}, "drop --devices 4"),
        ({"rules": ("kernel=data",)}, "give a --mesh"),
        ({"preset": "fsdp"}, "give a --mesh"),
        (
            {"mesh": "data=2,model=4", "seeds": 2, "axis_type": AxisType.Explicit},
            "drop --axis-types",
        ),
        (
            {"mesh": "data=1,model=8", "rules": ("kernel=model,*",)},
            "a/kernel .16, 8.: mesh axis 'model' splits axis -2 into 8 shards of 2, which cuts",
        ),
    ],
)
def test_what_cannot_be_placed(options, message):
    with pytest.raises(ValueError, match=message):
        place(12, **options)


@pytest.mark.parametrize("devices", [1, 4])
def test_several_processes_need_all_devices(monkeypatch, devices):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=f"need all of their 8 devices, got {devices}"):
        place(16, devices=devices)
