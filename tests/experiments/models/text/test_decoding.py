"""Beam search against every sequence there is, and against a search written with lists."""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.text.decoding import beam_search, draw
from experiments.models.text.transformer import Decoder, Size, Transformer

PADDING, BEGIN, END, VOCABULARY, LENGTH = 0, 1, 2, 6, 4
WORDS = range(3, VOCABULARY)
SOURCE = np.array([[3, 4, 5, 2], [5, 5, 2, 0], [4, 2, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def model():
    network = Transformer(Size(16, 32, 2, 1), VOCABULARY)
    variables = jax.jit(network.init)(jax.random.key(3), SOURCE, SOURCE)
    # Sharper than at the start, so that sequences differ in more than their length.
    return network, jax.tree.map(lambda leaf: 3 * leaf, variables)


@pytest.fixture(scope="module")
def scores(model):
    """Of each source: sequence -> log probability, for all that end in time; computed at once.

    And prefix -> log probabilities of what follows it.
    """
    network, variables = model
    sequences = [
        (*words, END) for count in range(LENGTH) for words in itertools.product(WORDS, repeat=count)
    ]
    target = np.zeros((len(sequences), LENGTH), np.int32)
    for row, sequence in zip(target, sequences, strict=True):
        row[: len(sequence)] = sequence
    read = np.pad(target[:, :-1], ((0, 0), (1, 0)), constant_values=BEGIN)
    apply = jax.jit(lambda *tokens: jax.nn.log_softmax(network.apply(variables, *tokens)))
    found = []
    for source in SOURCE:
        logs = np.asarray(apply(np.tile(source, (len(sequences), 1)), read))
        chosen = np.take_along_axis(logs, target[..., None], axis=2)[..., 0]
        sums = (chosen * (target != PADDING)).sum(axis=1)
        following = {
            sequence[:-1]: row[len(sequence) - 1]
            for sequence, row in zip(sequences, logs, strict=True)
        }
        found.append((dict(zip(sequences, sums.tolist(), strict=True)), following))
    return found


@pytest.fixture(scope="module")
def search(model):
    """(beams, alpha) -> sequences and scores."""
    network, variables = model

    @partial(jax.jit, static_argnums=1)
    def run(source, beams, alpha):
        memory = network.apply(variables, source, LENGTH, method="begin")
        return beam_search(
            lambda *now: network.apply(variables, *now, method="step"),
            memory.repeat(beams),
            batch=len(source),
            length=LENGTH,
            begin=BEGIN,
            end=END,
            padding=PADDING,
            beams=beams,
            alpha=alpha,
        )

    def found(beams, alpha):
        tokens, values = jax.device_get(run(SOURCE, beams, alpha))
        return [tuple(row[row != PADDING].tolist()) for row in tokens], values

    return found


def penalised(log, sequence, alpha):
    return log / ((5 + len(sequence)) / 6) ** alpha


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_with_a_beam_for_every_beginning_it_finds_the_best_there_is(search, scores, alpha):
    tokens, values = search(len(WORDS) ** (LENGTH - 1), alpha)
    for found, value, (all_scores, _) in zip(tokens, values, scores, strict=True):
        best = max(all_scores, key=lambda s, a=all_scores: penalised(a[s], s, alpha))
        assert found == best
        assert value == pytest.approx(penalised(all_scores[best], best, alpha), abs=1e-4)


def test_the_penalty_makes_longer_sequences_win(search):
    lengths = [sum(map(len, search(27, alpha)[0])) for alpha in (0.0, 3.0)]
    assert lengths[0] < lengths[1]


def search_with_lists(following, beams, alpha):
    """The same search on Python lists."""
    alive, best, best_score = [((), 0.0)], None, -np.inf
    for _ in range(LENGTH):
        grown = []
        for prefix, log in alive:
            logs = following[prefix]
            ended = penalised(log + logs[END], (*prefix, END), alpha)
            if ended > best_score:
                best, best_score = (*prefix, END), ended
            grown += [((*prefix, word), log + logs[word]) for word in WORDS]
        alive = sorted(grown, key=lambda entry: -entry[1])[:beams]
    return best, best_score


@pytest.mark.parametrize("beams", [1, 2])
def test_few_beams_keep_the_likeliest_beginnings(search, scores, beams):
    tokens, values = search(beams, 0.6)
    for found, value, (_, following) in zip(tokens, values, scores, strict=True):
        expected, score = search_with_lists(following, beams, 0.6)
        assert found == expected
        assert value == pytest.approx(score, abs=1e-4)


class Nothing(NamedTuple):
    """The memory of a model that looks at its last token only."""

    def take(self, rows):
        return self


def test_padding_and_begin_are_never_written():
    logits = jnp.array([9.0, 9.0, 0.0, 1.0, -1.0])  # padding and begin are the likeliest
    tokens, _ = beam_search(
        lambda last, index, cache: (jnp.tile(logits, (len(last), 1)), cache),
        Nothing(),
        batch=1,
        length=5,
        begin=BEGIN,
        end=END,
        padding=PADDING,
        beams=2,
        alpha=0.0,
    )
    assert tokens.tolist() == [[END, 0, 0, 0, 0]]


def test_drawing_follows_the_models_distribution():
    chances = np.array([0.1, 0.2, 0.7])

    def step(tokens, index, cache):
        # Of the token after an even one; an odd one is followed by 0.
        odd = jnp.where(jnp.arange(3) == 0, 0.0, -jnp.inf)
        return jnp.where((tokens % 2 == 1)[:, None], odd, jnp.log(chances)), cache

    prompt = jnp.zeros((4000, 2), jnp.int32)
    drawn = np.asarray(draw(step, (), prompt, length=2, key=jax.random.key(0)))
    first = np.bincount(drawn[:, 0], minlength=3) / len(drawn)
    np.testing.assert_allclose(first, chances, atol=0.03)
    assert (drawn[drawn[:, 0] == 1, 1] == 0).all()
    second = np.bincount(drawn[drawn[:, 0] != 1, 1], minlength=3)
    np.testing.assert_allclose(second / second.sum(), chances, atol=0.03)


def test_at_a_low_temperature_drawing_takes_the_likeliest():
    network = Decoder(Size(16, 32, 2, 1), VOCABULARY)
    prompt = np.array([[3, 4], [5, 5]], np.int32)
    variables = jax.jit(network.init)(jax.random.key(0), prompt)

    @jax.jit
    def run(prompt):
        memory = network.apply(variables, 2, 6, method="begin")
        return draw(
            lambda *now: network.apply(variables, *now, method="step"),
            memory,
            prompt,
            length=4,
            key=jax.random.key(0),
            temperature=1e-6,
        )

    apply = jax.jit(network.apply)
    tokens = np.zeros((2, 6), np.int32)
    tokens[:, :2] = prompt
    for place in range(2, 6):
        tokens[:, place] = np.argmax(apply(variables, tokens)[:, place - 1], axis=1)
    np.testing.assert_array_equal(run(prompt), tokens[:, 2:])
