"""Pieces of words: there and back, the same every time, and what does not fit."""

import pytest

from experiments.data.vocabulary import (
    BEGIN,
    END,
    PADDING,
    UNKNOWN,
    load_vocabulary,
    train_vocabulary,
)

SENTENCES = [f"{a} {b} und {b}" for a in ("eins", "zwei", "drei") for b in ("hundert", "tausend")]


@pytest.fixture(scope="module")
def vocabulary():
    return train_vocabulary(SENTENCES, 40)


def test_there_and_back(vocabulary):
    encoded = vocabulary.encode(SENTENCES)
    assert vocabulary.decode(encoded) == SENTENCES
    assert min(map(min, encoded)) > UNKNOWN
    assert max(map(max, encoded)) < len(vocabulary) == 40


def test_text_ends_at_the_first_end_and_padding_says_nothing(vocabulary):
    (row,) = vocabulary.encode(["zwei hundert"])
    framed = [BEGIN, *row, END, *row, PADDING]
    assert vocabulary.decode([framed, [END], [PADDING, *row]]) == [
        "zwei hundert",
        "",
        "zwei hundert",
    ]


def test_the_same_corpus_gives_the_same_pieces(vocabulary):
    again = train_vocabulary(SENTENCES, 40)
    assert again.fingerprint == vocabulary.fingerprint
    assert train_vocabulary([*SENTENCES, "vier"], 40).fingerprint != vocabulary.fingerprint


def test_a_size_that_does_not_fit_the_corpus():
    for size in (5, 5000):
        with pytest.raises(ValueError, match=f"cannot make a vocabulary of {size} pieces"):
            train_vocabulary(SENTENCES, size)


def test_a_file_comes_back_or_says_what_is_wrong(vocabulary, tmp_path):
    path = tmp_path / "x.model"
    path.write_bytes(vocabulary.model)
    assert load_vocabulary(path, size=40).fingerprint == vocabulary.fingerprint
    with pytest.raises(ValueError, match="has 40 pieces, expected 41: delete it"):
        load_vocabulary(path, size=41)
    path.write_bytes(vocabulary.model[:100])
    with pytest.raises(ValueError, match=r"x\.model"):
        load_vocabulary(path, size=40)
