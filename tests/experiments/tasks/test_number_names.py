"""Number names: real pairs, held-out numbers, sizes that fit."""

import jax
import numpy as np
import pytest

from experiments.tasks import number_names
from experiments.tasks.number_names import DIGITS, is_test, names, number_pairs
from experiments.tasks.options import Options


@pytest.fixture(scope="module")
def task():
    return number_names.task(train_pairs=400, test_pairs=40)


def test_names_are_those_of_the_languages():
    assert names([21, 345]) == [
        ("twenty-one", "einundzwanzig"),
        ("three hundred and forty-five", "dreihundertfünfundvierzig"),
    ]


def test_no_tested_number_is_trained_on():
    train, test = number_pairs(400, 40)
    assert (len(set(train)), len(set(test))) == (400, 40)
    assert not set(train) & set(test)
    held_out = names(number for number in range(2000) if is_test(number))
    assert not set(held_out) & set(train)
    assert 0.05 < np.mean([is_test(number) for number in range(2000)]) < 0.15


def test_numbers_are_of_all_lengths():
    train, _ = number_pairs(400, 40)
    assert any("million" in english for english, _ in train)
    assert any(" " not in english for english, _ in train)
    longest = names([10**DIGITS - 1, 777_777_777])
    assert max(len(english) for english, _ in train) <= max(len(e) for e, _ in longest)


def test_nothing_is_too_long(task):
    assert all("0 too long" in note for note in task.notes[1:3])


def test_shapes_and_sparse_layers(task):
    batch = next(task.train_batches(0, 0))
    assert batch["source"].shape == batch["target"].shape == (32, 32)
    value, _ = jax.eval_shape(
        lambda key: task.loss(task.init(key)["params"], {}, batch, key), jax.random.key(0)
    )
    assert value.shape == ()
    assert task.keep_dense == ()


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="no model named 'resnet18'"):
        number_names.task(Options(model="resnet18"))


def test_validation_holds_numbers_out_and_never_uses_test_numbers():
    train, held_out = (set(pairs) for pairs in number_pairs(400, 40, validation=True))
    assert (len(train), len(held_out)) == (400, 40)
    assert not train & held_out
    tested = set(names(number for number in range(2000) if is_test(number)))
    assert not tested & (train | held_out)
