"""Translation of number names from English to German: real words, real reordering.

"Forty-five thousand" is "fünfundvierzigtausend": the ones come before the tens, and everything is
one word. num2words generates any number of pairs; a tenth of the numbers, chosen by a hash, is held
out for testing. German writes a name below a million as a single word, so BLEU counts n-grams of
characters here; exact match is the metric for comparing methods.

Run:
  python -m experiments.compare --task number_names
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from num2words import num2words

from experiments.data.sentence_pairs import encode_pairs
from experiments.data.vocabulary import train_vocabulary
from experiments.models.text.transformer import TRANSFORMERS
from experiments.tasks.families.translation import (
    BLEU_METRIC,
    CHRF_METRIC,
    EXACT_METRIC,
    translation_task,
)
from experiments.tasks.options import BOTH_DTYPES, DEFAULTS, Options, offers
from experiments.tasks.task import Recipe, Task

DIGITS = 9
TRAIN_PAIRS = 3200
TEST_PAIRS = 384
PIECES = 160
LENGTH = 32

RECIPE = Recipe(
    epochs=8,
    batch_size=32,
    optimizer="adamw",
    learning_rate=3e-3,
    schedule="inverse_sqrt",
    warmup_epochs=1.5,
    second_momentum=0.98,
    weight_decay=0.0,
    # As found for python_bytes.
    lambda_w=6e-5,
    lambda_decoupled=0.02,
    label_smoothing=0.1,
)


@offers(*TRANSFORMERS, default="transformer_tiny", dtypes=BOTH_DTYPES, validation=True)
def task(
    options: Options = DEFAULTS, *, train_pairs: int = TRAIN_PAIRS, test_pairs: int = TEST_PAIRS
) -> Task:
    """Makes the task of translating number names.

    Args:
      options: model, recipe and the like.
      train_pairs: number of training pairs.
      test_pairs: number of test pairs; their numbers are never trained on.
    """
    train, test = number_pairs(train_pairs, test_pairs, validation=options.validation)
    vocabulary = train_vocabulary((side for pair in train for side in pair), PIECES)
    encoded = encode_pairs(test, vocabulary, length=LENGTH)
    return translation_task(
        name="number_names",
        size=TRANSFORMERS[options.model],
        vocabulary=vocabulary,
        train=encode_pairs(train, vocabulary, length=LENGTH),
        test=encoded,
        texts=[test[index] for index in encoded.kept],
        recipe=options.changed(RECIPE),
        metrics=(EXACT_METRIC, BLEU_METRIC, CHRF_METRIC),
        bleu_tokens="char",
        dtype=jnp.dtype(options.dtype),
        notes=(f"A vocabulary of {PIECES} pieces for both languages.",),
        identity=options.identity,
    )


@cache
def number_pairs(
    train: int, test: int, *, validation: bool = False
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """English and German names of different numbers, to train on and to test with.

    Numbers of 1 to `DIGITS` digits are equally likely, as far as there are enough. For validation,
    both come from the numbers that are not test numbers.
    """
    rng = np.random.default_rng(0)
    # Dicts as sets that keep the order in which numbers were drawn.
    halves: dict[bool, dict[int, None]] = {False: {}, True: {}}
    wanted = {False: train, True: test}
    while any(len(halves[half]) < wanted[half] for half in halves):
        number = int(rng.integers(0, 10 ** rng.integers(1, DIGITS + 1)))
        half = is_test(number)
        if validation:
            if half:
                continue
            half = is_held_out(number)
        if len(halves[half]) < wanted[half]:
            halves[half][number] = None
    return tuple(names(halves[False])), tuple(names(halves[True]))


def names(numbers: Any) -> list[tuple[str, str]]:
    """The English and the German name of each number."""
    return [(num2words(n, lang="en"), num2words(n, lang="de")) for n in numbers]


def is_test(number: int) -> bool:
    """Whether a number is held out for testing. It is one in ten and depends only on the number."""
    # 26 of the 256 values of a byte.
    return hashlib.sha256(str(number).encode()).digest()[0] < 26


def is_held_out(number: int) -> bool:
    """Whether a number, if it is trained on, is held out for validation: again one in ten."""
    return hashlib.sha256(str(number).encode()).digest()[1] < 26
