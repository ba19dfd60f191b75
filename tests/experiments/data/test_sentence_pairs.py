"""Pairs as arrays: what is kept, what is left out and counted, and the batches."""

import numpy as np
import pytest

from experiments.data.sentence_pairs import (
    encode_pairs,
    evaluation_batches,
    shifted,
    training_batches,
)
from experiments.data.vocabulary import BEGIN, END, PADDING, train_vocabulary

WORDS = ("one", "two", "three", "four", "five")
PAIRS = [(f"{a} {b}", f"{b} {a}") for a in WORDS for b in WORDS]


@pytest.fixture(scope="module")
def vocabulary():
    return train_vocabulary((side for pair in PAIRS for side in pair), 40)


@pytest.fixture(scope="module")
def encoded(vocabulary):
    return encode_pairs(PAIRS, vocabulary, length=12)


def test_rows_are_the_sentences_with_an_end_and_padding(vocabulary, encoded):
    for side in (0, 1):
        tokens = (encoded.source, encoded.target)[side]
        assert tokens.shape == (25, 12)
        assert vocabulary.decode(tokens.tolist()) == [pair[side] for pair in PAIRS]
        for row in tokens:
            end = row.tolist().index(END)
            assert PADDING not in row[:end]
            assert (row[end + 1 :] == PADDING).all()


def test_what_is_left_out_is_counted(vocabulary):
    long = ("one " * 20, "two")
    pairs = [PAIRS[0], ("", "two"), long, ("one", "  "), ("two", "one " * 20), ("", long[0])]
    found = encode_pairs([*pairs, PAIRS[1]], vocabulary, length=12)
    assert found.kept.tolist() == [0, 6]
    assert (found.empty, found.too_long) == (3, 2)
    assert "left out: 3 with an empty side, 2 too long" in found.note("test")


def test_a_side_fills_the_length_exactly(vocabulary):
    (row,) = vocabulary.encode(["one two three"])
    fits = encode_pairs([("one two three", "one")], vocabulary, length=len(row) + 1)
    assert fits.source[0, -1] == END
    words = f"0 have an empty side, 1 have more than {len(row)} tokens"
    with pytest.raises(ValueError, match=words):
        encode_pairs([("one two three", "one")], vocabulary, length=len(row))


def test_no_pair_left_is_an_error(vocabulary):
    with pytest.raises(ValueError, match="no pairs are left of 2: 2 have an empty side"):
        encode_pairs([("", "x"), ("y", " ")], vocabulary, length=9)


def test_every_pair_is_seen_once_in_an_order_of_its_own(encoded):
    batches = list(training_batches(encoded, 8, 0, 0))
    rows = np.concatenate([batch["source"] for batch in batches])
    assert rows.shape == (24, 12)
    assert len({row.tobytes() for row in rows}) == 24
    first = [next(training_batches(encoded, 8, *key))["source"] for key in ((0, 0), (0, 1), (1, 0))]
    np.testing.assert_array_equal(first[0], batches[0]["source"])
    assert (first[0] != first[1]).any()
    assert (first[0] != first[2]).any()


def test_a_process_reads_its_rows_from_a_step_on(encoded):
    rows = np.array([1, 2, 7])
    parts = list(training_batches(encoded, 8, seed=3, epoch=1, first_step=1, rows=rows))
    whole = list(training_batches(encoded, 8, 3, 1))[1:]
    assert len(parts) == len(whole) == 2
    for part, batch in zip(parts, whole, strict=True):
        assert part.keys() == batch.keys()
        for name, values in batch.items():
            np.testing.assert_array_equal(part[name], values[rows])


def test_the_decoder_reads_what_comes_before(encoded):
    batch = next(training_batches(encoded, 8, 0, 0))
    assert (batch["read"][:, 0] == BEGIN).all()
    np.testing.assert_array_equal(batch["read"][:, 1:], batch["target"][:, :-1])
    np.testing.assert_array_equal(shifted(np.array([[4, 5, END]])), [[BEGIN, 4, 5]])


def test_evaluation_sees_every_pair_in_order(encoded):
    batches = list(evaluation_batches(encoded, 10))
    assert [batch["valid"].sum() for batch in batches] == [10, 10, 5]
    index = np.concatenate([batch["index"][batch["valid"] == 1] for batch in batches])
    np.testing.assert_array_equal(index, np.arange(25))
    assert {batch["source"].shape for batch in batches} == {(10, 12)}


@pytest.mark.parametrize("rows", [np.arange(3), np.array([4, 7, 9, 10, 11]), np.array([10, 11])])
def test_a_process_tests_its_rows_and_fills_them_up(encoded, rows):
    parts = list(evaluation_batches(encoded, 10, rows_of=lambda size: rows))
    whole = list(evaluation_batches(encoded, 10))
    assert len(parts) == len(whole)
    for part, batch in zip(parts, whole, strict=True):
        assert part.keys() == batch.keys()
        for name, values in batch.items():
            there = values[rows[rows < 10]]
            assert part[name].dtype == values.dtype
            np.testing.assert_array_equal(part[name][: len(there)], there)
            assert len(part[name]) == len(rows)
            assert not part[name][len(there) :].any()
