"""The order of examples: reproducible, complete, fresh in every epoch."""

import itertools
import re

import numpy as np
import pytest

from experiments.data.epochs import Reading, eval_epoch, pad_batch, steps_per_epoch, train_epoch
from experiments.data.records import open_images
from experiments.tasks import cifar10
from tests.experiments.prepared import cifar10_examples, prepare


class Squares:
    """Stands for a data set on disk; counts how often it is read."""

    def __init__(self, count):
        self.count = count
        self.reads = 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        return {"index": np.int64(index), "square": np.full((2,), index**2)}


def noisy(example, rng):
    return {**example, "noise": rng.random(3)}


def plain(example):
    return example


def epoch_of(count=37, batch_size=5, **arguments):
    arguments = {"seed": 0, "epoch": 0} | arguments
    return list(train_epoch(Squares(count), noisy, batch_size=batch_size, **arguments))


def order(batches):
    return np.concatenate([batch["index"] for batch in batches]).tolist()


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(("count", "batch_size"), [(37, 5), (40, 5), (5, 5), (9, 1)])
def test_no_example_is_lost_or_seen_twice(count, batch_size):
    seen = order(epoch_of(count, batch_size))
    assert len(seen) == count - count % batch_size
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(count))
    assert steps_per_epoch(Squares(count), batch_size) * batch_size == len(seen)


def test_arrays_of_an_example_stay_together():
    for batch in epoch_of():
        np.testing.assert_array_equal(batch["square"][:, 0], batch["index"] ** 2)


def test_same_arguments_same_epoch_and_other_arguments_another():
    assert_same(epoch_of(seed=3, epoch=2), epoch_of(seed=3, epoch=2))
    runs = [epoch_of(seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(runs, 2):
        assert order(one) != order(other)
        assert not np.isin(
            np.concatenate([batch["noise"] for batch in one]),
            np.concatenate([batch["noise"] for batch in other]),
        ).any()


def test_left_out_examples_change_from_epoch_to_epoch():
    left_out = [set(range(37)) - set(order(epoch_of(epoch=epoch))) for epoch in range(8)]
    assert len(set.union(*left_out)) > 6


def test_threads_and_processes_change_nothing():
    expected = epoch_of(reading=Reading(threads=0))
    assert_same(epoch_of(reading=Reading(threads=8)), expected)
    assert_same(epoch_of(reading=Reading(workers=2, threads=1)), expected)


@pytest.mark.parametrize("first_step", [0, 1, 4, 7])
def test_start_in_the_middle(first_step):
    assert_same(epoch_of(first_step=first_step), epoch_of()[first_step:])


def test_starting_in_the_middle_does_not_read_what_came_before():
    records = Squares(40)
    list(train_epoch(records, noisy, batch_size=5, seed=0, epoch=0, first_step=6))
    assert records.reads == 10


@pytest.mark.parametrize("shares", [1, 2, 5])
def test_processes_share_batches_without_overlap_or_gap(shares):
    """Rows of each batch: together they are the batch, and nobody reads what others have."""
    whole, step = epoch_of(33, 10, first_step=1), 10 // shares
    sources = [Squares(33) for _ in range(shares)]
    parts = [
        list(
            train_epoch(
                source,
                noisy,
                batch_size=10,
                seed=0,
                epoch=0,
                first_step=1,
                rows=np.arange(share * step, (share + 1) * step),
            )
        )
        for share, source in enumerate(sources)
    ]
    for batch, *own in zip(whole, *parts, strict=True):
        joined = {name: np.concatenate([part[name] for part in own]) for name in batch}
        assert_same([joined], [batch])
    assert [source.reads for source in sources] == [2 * step] * shares


def test_evaluation_sees_every_example_once_in_order_and_pads():
    batches = list(eval_epoch(Squares(12), plain, batch_size=5))
    assert [batch["index"].shape for batch in batches] == [(5,)] * 3
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert valid.tolist() == [1] * 12 + [0] * 3
    assert order(batches)[:12] == list(range(12))
    assert not batches[-1]["square"][2:].any()
    assert_same(batches, eval_epoch(Squares(12), plain, batch_size=5, reading=Reading(threads=0)))


@pytest.mark.parametrize(
    "shares", [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3, 4]], [[0, 3], [1, 2], [4, 5]]]
)
def test_processes_share_evaluation_without_overlap_or_gap(shares):
    """The third share of three ends with padding, in every batch; of the last, it has only that."""
    whole = list(eval_epoch(Squares(12), plain, batch_size=5))
    sources = [Squares(12) for _ in shares]
    parts = [
        list(
            eval_epoch(source, plain, batch_size=5, rows_of=lambda size, rows=rows: np.array(rows))
        )
        for source, rows in zip(sources, shares, strict=True)
    ]
    order = np.concatenate(shares)
    for batch, *own in zip(whole, *parts, strict=True):
        for name, values in batch.items():
            joined = np.concatenate([part[name] for part in own])
            np.testing.assert_array_equal(joined[order < 5], values[order[order < 5]])
            assert joined.dtype == values.dtype
            assert not joined[order >= 5].any()
    reads = [sum(row < 5 for row in rows) * 2 + sum(row < 2 for row in rows) for rows in shares]
    # One that has nothing but padding of a batch reads an example to know its shapes.
    assert [source.reads for source in sources] == [
        count + all(row >= 2 for row in rows) for count, rows in zip(reads, shares, strict=True)
    ]


def test_padding_keeps_dtypes():
    batch = pad_batch({"image": np.ones((2, 3), np.float32), "label": np.ones(2, np.int32)}, 4)
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "image": ((4, 3), "float32"),
        "label": ((4,), "int32"),
        "valid": ((4,), "int32"),
    }


@pytest.mark.parametrize("batch_size", [0, -1, 38])
def test_impossible_batch_sizes(batch_size):
    with pytest.raises(ValueError, match=re.escape(f"from 1 to 37 examples, got {batch_size}")):
        steps_per_epoch(Squares(37), batch_size)


def test_an_abandoned_epoch_stops_reading():
    batches = train_epoch(Squares(10_000), noisy, batch_size=2, seed=0, epoch=0)
    next(batches)
    batches.close()
    assert list(batches) == []


@pytest.mark.parametrize("reading", [Reading(), Reading(workers=1, threads=1)])
def test_a_broken_image_is_named_from_threads_and_from_processes(tmp_path, reading):
    examples = list(cifar10_examples(6))
    examples[3]["image"] = examples[3]["image"][:100]
    prepare("cifar10", tmp_path, {"train": examples}, shards=1)
    records = open_images("cifar10", "train", name_feature="id", data_dir=tmp_path)
    batches = train_epoch(
        records, cifar10.train_example, batch_size=2, seed=0, epoch=0, reading=reading
    )
    with pytest.raises(Exception, match=r"example \d \(0_00003\): 100 bytes that are not"):
        list(batches)
