"""What translation tasks share: loss, scores, and a few steps of training on tiny sentences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu

from experiments.data.sentence_pairs import encode_pairs
from experiments.data.vocabulary import PADDING, train_vocabulary
from experiments.models.text.transformer import Size, Transformer
from experiments.tasks.families.translation import (
    BLEU_METRIC,
    EXACT_METRIC,
    masked_mean,
    text_scores,
    translation_task,
)
from experiments.tasks.task import Recipe
from experiments.training.loop import train
from experiments.training.methods import METHODS
from experiments.training.step import Job, plan_of

SIZE = Size(16, 32, 2, 1)
WORDS = ("one", "two", "three", "four")
PAIRS = [(f"{a} {b}", f"{b} {a}") for a in WORDS for b in WORDS]
LENGTH = 10
RECIPE = Recipe(
    epochs=2,
    batch_size=4,
    optimizer="adamw",
    learning_rate=0.01,
    schedule="inverse_sqrt",
    warmup_epochs=0.5,
    label_smoothing=0.1,
    lambda_decoupled=0.1,
)


def make_task(test=PAIRS, **changed):
    vocabulary = train_vocabulary((side for pair in PAIRS for side in pair), 36)
    encoded = encode_pairs(test, vocabulary, length=LENGTH)
    given = {
        "name": "tiny",
        "size": SIZE,
        "vocabulary": vocabulary,
        "train": encode_pairs(PAIRS, vocabulary, length=LENGTH),
        "test": encoded,
        "texts": [test[index] for index in encoded.kept],
        "recipe": RECIPE,
        "metrics": (EXACT_METRIC, BLEU_METRIC),
        "eval_batch_size": 10,
        "beams": 2,
    }
    return translation_task(**{**given, **changed})


@pytest.fixture(scope="module")
def task():
    return make_task()


@pytest.fixture(scope="module")
def params(task):
    return jax.jit(task.init)(jax.random.key(0))["params"]


def logs_of(params, batch):
    network = jax.jit(Transformer(SIZE, 36).apply)
    logits = np.asarray(network({"params": params}, batch["source"], batch["read"]), np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_the_loss_smooths_labels_and_leaves_padding_out(task, params):
    batch = next(task.train_batches(0, 0))
    logs = logs_of(params, batch)
    total, count = 0.0, 0
    for row, target in zip(logs, batch["target"], strict=True):
        for place, token in enumerate(target):
            if token == PADDING:
                continue
            wanted = np.full(36, 0.1 / 36)
            wanted[token] += 0.9
            total, count = total - (wanted * row[place]).sum(), count + 1
    loss, collections = task.loss(params, {}, batch, jax.random.key(0))
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert collections == {}


def test_evaluation_is_per_token_without_smoothing(task, params):
    *_, batch = task.eval_batches()
    assert batch["valid"].sum() == 6
    logs = logs_of(params, batch)
    chosen = np.take_along_axis(logs, batch["target"][..., None], axis=-1)[..., 0]
    counted = (batch["target"] != PADDING) & (batch["valid"] == 1)[:, None]
    sums = task.evaluate(params, {}, batch)
    assert sums["count"] == counted.sum()
    assert sums["loss"] == pytest.approx(-chosen[counted].sum(), rel=1e-5)


def test_the_mean_of_what_is_counted():
    values = jnp.array([[1.0, jnp.inf], [3.0, jnp.nan]])
    assert masked_mean(values, jnp.array([[True, False], [True, False]])) == 2


def test_baselines_are_scores_of_what_takes_no_network():
    test = [("one two", "two one"), ("three", "three"), ("four", PAIRS[0][1])]
    task = make_task(test=test)
    assert dict(task.baselines) == pytest.approx(
        {"the source unchanged": 1 / 3, "the same training sentence for all": 1 / 3}
    )
    copied = sacrebleu.corpus_bleu(
        ["one two", "three", "four"], [[reference for _, reference in test]]
    )
    assert task.notes[-2] == (
        f"Without learning, the source unchanged: exact match % 33.33, BLEU {copied.score:.2f}."
    )
    swapped = make_task(test=test, metrics=(BLEU_METRIC,))
    assert dict(swapped.baselines)["the source unchanged"] == pytest.approx(copied.score / 100)


def test_scores_are_sacrebleus():
    references = ["the cat sat on the mat today", "one two three four five"]
    translations = ["the cat sat on a mat today", references[1]]
    found = text_scores(translations, references)
    bleu = sacrebleu.corpus_bleu(translations, [references])
    assert found["BLEU"] == pytest.approx(bleu.score / 100)
    chrf = sacrebleu.corpus_chrf(translations, [references])
    assert found["chrF"] == pytest.approx(chrf.score / 100)
    assert found["exact match"] == 0.5
    perfect = text_scores(references, references)
    assert all(score == pytest.approx(1) for score in perfect.values())
    # A single word has no n-grams of words, but of characters.
    word = ["einundzwanzig"]
    assert text_scores(word, word, bleu_tokens="char")["BLEU"] == pytest.approx(1)


def test_the_score_compares_each_translation_with_its_own_reference(task):
    batches = list(task.eval_batches())
    right = [batch["target"] for batch in batches]
    assert task.score(batches, right)["exact match"] == 1
    # Rows that only fill the last batch up do not count.
    spoilt = [tokens.copy() for tokens in right]
    spoilt[-1][6:] = 5
    assert task.score(batches, spoilt)["exact match"] == 1
    spoilt[0][0] = spoilt[0][1]
    assert task.score(batches, spoilt)["exact match"] == pytest.approx(15 / 16)


def test_a_few_steps_learn_something_and_everything_is_scored(task):
    plan = plan_of(task, "2:4")
    job = Job(task, plan, METHODS["sr_ste"].build(plan, task.recipe, task.steps_per_epoch))
    first, last = train(job)
    assert set(last.test) == {"loss", "exact match", "BLEU", "chrF"}
    assert last.test["loss"] < first.test["loss"]


def test_what_is_shown_are_test_pairs_the_longest_first(params):
    pairs = [("one", "a"), ("one two three", "b"), ("one two", "c")]
    shown = make_task(pairs).show(params, {})
    assert {list(row)[-1] for row in shown} == {"network"}
    sources = list(dict.fromkeys((row["source"], row["reference"]) for row in shown))
    assert sources == [pairs[1], pairs[2], pairs[0]]


def test_notes_count_what_was_left_out_and_the_vocabulary_has_a_name():
    task = make_task([*PAIRS, ("", "one"), ("one " * 30, "two")])
    assert "16 test pairs of at most 10 tokens" in task.notes[1]
    assert "left out: 1 with an empty side, 1 too long" in task.notes[1]
    ((name, fingerprint),) = task.identity
    assert name == "vocabulary"
    assert fingerprint.startswith("36 pieces ")


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="16 pairs do not fill a batch of 256"):
        make_task(recipe=Recipe())
    with pytest.raises(ValueError, match="16 test pairs need as many texts, got 0"):
        make_task(texts=[])
