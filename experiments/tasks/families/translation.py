"""What every translation task shares: the loss over tokens, beam search, BLEU and exact match."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from experiments.data.epochs import steps_per_epoch
from experiments.data.sentence_pairs import EncodedPairs, evaluation_batches, training_batches
from experiments.data.vocabulary import BEGIN, END, PADDING, Vocabulary
from experiments.models.text.decoding import beam_search
from experiments.models.text.transformer import Size, Transformer
from experiments.tasks.families.classification import cross_entropy
from experiments.tasks.task import Batch, Metric, Recipe, Shown, Sums, Task, Variables

BLEU_METRIC = Metric("BLEU", unit="")
CHRF_METRIC = Metric("chrF", unit="")
EXACT_METRIC = Metric("exact match")

_SHOWN = 6


def translation_task(
    *,
    name: str,
    size: Size,
    vocabulary: Vocabulary,
    train: EncodedPairs,
    test: EncodedPairs,
    texts: Sequence[tuple[str, str]],
    recipe: Recipe,
    metrics: tuple[Metric, ...],
    bleu_tokens: str = "13a",
    beams: int = 4,
    eval_batch_size: int = 128,
    dtype: Any = jnp.float32,
    notes: tuple[str, ...] = (),
    identity: tuple[tuple[str, str], ...] = (),
    **described: Any,
) -> Task:
    """Makes the task of translating with an encoder and a decoder.

    Training minimizes the mean over all tokens of a batch except padding, with the recipe's label
    smoothing; evaluation sums the loss without smoothing. Translations are found by beam search
    and scored as text: BLEU and chrF over the whole test set as sacrebleu defines them, here as
    fractions, and the share of translations that equal the reference letter by letter.

    Args:
      name: of the task.
      size: of the Transformer.
      vocabulary: of both languages.
      train: pairs to train on.
      test: pairs to translate.
      texts: source and reference of each test pair, in its order.
      recipe: default hyper-parameters.
      metrics: which to show, of those at the top of this file.
      bleu_tokens: sacrebleu's tokenizer for BLEU.
      beams: of the beam search.
      eval_batch_size: sentences translated at once.
      dtype: the network computes in.
      notes: about the data.
      identity: what decides the result besides the vocabulary.
      **described: other fields of `Task`.

    Raises:
      ValueError: if there are fewer training pairs than a batch takes, or texts are missing.
    """
    if len(train.source) < recipe.batch_size:
        raise ValueError(f"{len(train.source)} pairs do not fill a batch of {recipe.batch_size}")
    if len(texts) != len(test.source):
        raise ValueError(f"{len(test.source)} test pairs need as many texts, got {len(texts)}")
    network = Transformer(size, len(vocabulary), PADDING, dtype)
    length = test.target.shape[1]

    def init(key: jax.Array) -> Variables:
        # No parameter depends on the number of tokens.
        nothing = jnp.zeros((1, 2), jnp.int32)
        return dict(network.init(key, nothing, nothing))

    def losses(params: Any, batch: Batch, smoothing: float, **options: Any) -> jax.Array:
        logits: Any = network.apply({"params": params}, batch["source"], batch["read"], **options)
        return cross_entropy(logits, batch["target"], smoothing=smoothing)

    def loss(
        params: Any, collections: Variables, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Variables]:
        options = {"train": True, "rngs": {"dropout": key}}
        values = losses(params, batch, recipe.label_smoothing, **options)
        # Over tokens, not sentences: a long sentence counts more, as in the papers.
        return masked_mean(values, batch["target"] != PADDING), collections

    def evaluate(params: Any, collections: Variables, batch: Batch) -> Sums:
        del collections
        counted = (batch["target"] != PADDING) & (batch["valid"] != 0)[:, None]
        values = jnp.where(counted, losses(params, batch, 0.0), 0.0)
        # `count` counts tokens here, so that the loss is a mean over tokens.
        return {"count": counted.sum().astype(jnp.float32), "loss": values.sum()}

    def predict(params: Any, collections: Variables, batch: Batch) -> jax.Array:
        del collections
        return translate(network, params, jnp.asarray(batch["source"]), length=length, beams=beams)

    # What a reader compares BLEU with: scores that need no learning.
    trivial = _without_learning(vocabulary, train, texts, bleu_tokens)
    batches = partial(training_batches, train, recipe.batch_size)
    tests = partial(evaluation_batches, test, eval_batch_size)
    return Task(
        name=name,
        init=init,
        loss=loss,
        evaluate=evaluate,
        train_batches=batches,
        train_rows=batches,
        eval_batches=tests,
        eval_rows=tests,
        steps_per_epoch=steps_per_epoch(train.source, recipe.batch_size),
        recipe=recipe,
        metrics=metrics,
        predict=predict,
        scored_by=("index",),
        score=partial(_score, vocabulary, [target for _, target in texts], bleu_tokens),
        show=partial(_show, network, vocabulary, test, texts, beams),
        baselines=tuple((name, scores[metrics[0].name]) for name, scores in trivial.items()),
        notes=(
            *notes,
            train.note("training"),
            test.note("test"),
            *(_note(name, scores, metrics) for name, scores in trivial.items()),
        ),
        identity=(("vocabulary", vocabulary.fingerprint), *identity),
        **described,
    )


def masked_mean(values: jax.Array, counted: jax.Array) -> jax.Array:
    """Mean of the values where `counted`, which must hold somewhere."""
    return jnp.sum(jnp.where(counted, values, 0.0)) / jnp.sum(counted)


# Flax modules are hashed by their fields, so equal networks share one compilation.
@partial(jax.jit, static_argnames=("network", "length", "beams"))
def translate(
    network: Transformer, params: Any, source: jax.Array, *, length: int, beams: int
) -> jax.Array:
    """Translates (batch, source) tokens to (batch, length) tokens."""
    variables = {"params": params}
    memory: Any = network.apply(variables, source, length, method="begin")

    def step(tokens: jax.Array, index: jax.Array, cache: Any) -> Any:
        return network.apply(variables, tokens, index, cache, method="step")

    tokens, _ = beam_search(
        step,
        # Encoded once and then repeated: all beams of a sentence read the same source.
        memory.repeat(beams),
        batch=len(source),
        length=length,
        begin=BEGIN,
        end=END,
        padding=PADDING,
        beams=beams,
    )
    return tokens


def text_scores(
    translations: Sequence[str], references: Sequence[str], *, bleu_tokens: str = "13a"
) -> dict[str, float]:
    """BLEU, chrF and exact match of translations, as fractions.

    Source: Post, "A Call for Clarity in Reporting BLEU Scores", 2018 (sacrebleu); Popović, "chrF",
    2015.
    """
    bleu = BLEU(tokenize=bleu_tokens).corpus_score(translations, [references])
    chrf = CHRF().corpus_score(translations, [references])
    equal = [a == b for a, b in zip(translations, references, strict=True)]
    return {
        # sacrebleu's scores run from 0 to 100.
        BLEU_METRIC.name: bleu.score / 100,
        CHRF_METRIC.name: chrf.score / 100,
        EXACT_METRIC.name: float(np.mean(equal)),
    }


def _without_learning(
    vocabulary: Vocabulary, train: EncodedPairs, texts: Sequence[tuple[str, str]], bleu_tokens: str
) -> dict[str, dict[str, float]]:
    """Scores of answers that need no network, by name."""
    sources, references = zip(*texts, strict=True)
    (first,) = vocabulary.decode(train.target[:1].tolist())
    answers = {
        "the source unchanged": sources,
        "the same training sentence for all": [first] * len(texts),
    }
    return {
        name: text_scores(translations, references, bleu_tokens=bleu_tokens)
        for name, translations in answers.items()
    }


def _note(name: str, scores: dict[str, float], metrics: tuple[Metric, ...]) -> str:
    values = [f"{m.title} {m.scale * scores[m.name]:.{m.digits}f}" for m in metrics]
    return f"Without learning, {name}: {', '.join(values)}."


def _score(
    vocabulary: Vocabulary,
    references: Sequence[str],
    bleu_tokens: str,
    batches: list[Batch],
    predictions: list[Any],
) -> dict[str, float]:
    translations, chosen = [], []
    for batch, tokens in zip(batches, predictions, strict=True):
        # Padded rows translate to something too, which must not count.
        rows = np.flatnonzero(batch["valid"])
        translations += vocabulary.decode(tokens[rows])
        chosen += [references[index] for index in batch["index"][rows]]
    return text_scores(translations, chosen, bleu_tokens=bleu_tokens)


def _show(
    network: Transformer,
    vocabulary: Vocabulary,
    test: EncodedPairs,
    texts: Sequence[tuple[str, str]],
    beams: int,
    params: Any,
    collections: Variables,
) -> list[Shown]:
    """Translations of test sentences, the longest first and the shortest last of those shown."""
    del collections
    # The same sentences at every call, so that networks can be compared side by side.
    lengths = (test.source != PADDING).sum(axis=1)
    longest_first = np.argsort(-lengths, kind="stable")
    rows = longest_first[np.linspace(0, len(lengths) - 1, _SHOWN).astype(int)]
    source = jnp.asarray(test.source[rows], jnp.int32)
    tokens = translate(network, params, source, length=test.target.shape[1], beams=beams)
    translations = vocabulary.decode(np.asarray(tokens))
    return [
        {"source": texts[row][0], "reference": texts[row][1], "network": translation}
        for row, translation in zip(rows, translations, strict=True)
    ]
