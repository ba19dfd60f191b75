"""WMT 2014 English to German with a Transformer: the translation task of the SR-STE paper.

What this is for: the paper's machine translation, whose code was never released. Model, label
smoothing, Adam and schedule follow the original Transformer paper. Its base model takes 100,000
steps of about 25,000 source and 25,000 target tokens; here a batch is a fixed number of sentences.
BLEU is sacrebleu's with its default tokenizer, on newstest2014; scores from other definitions
cannot be compared with it. BLEU and time have not been measured with this code.

The first run learns the vocabulary from a sample of the training pairs and encodes all of them;
both are stored in the data set's folder.

Run:
  tfds build wmt14_translate/de-en --imports=tensorflow_datasets.translate.wmt14 \
    --file_format=array_record            # once; needs TensorFlow and the network
  python -m experiments.compare --task wmt14

Source: Vaswani et al., "Attention Is All You Need", 2017, sections 5 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.data.records import data_folder, open_source
from experiments.data.sentence_pairs import EncodedPairs, encode_pairs
from experiments.data.vocabulary import Vocabulary, load_vocabulary, train_vocabulary
from experiments.models.text.transformer import TRANSFORMERS
from experiments.tasks.families.translation import BLEU_METRIC, CHRF_METRIC, translation_task
from experiments.tasks.options import BOTH_DTYPES, DEFAULTS, Options, offers
from experiments.tasks.task import Compared, Recipe, Task
from nmjax.files.whole_files import write_whole

DATASET = "wmt14_translate/de-en"
PIECES = 32_000
SAMPLE = 1_000_000  # pairs that the vocabulary is learned from
TRAIN_LENGTH = 64
TEST_LENGTH = 256

# 4.5 million pairs are about 4,400 steps of 1,024 an epoch, so 23 epochs are 100,000 steps and
# 0.91 epochs the paper's 4,000 steps of warm-up, whose peak is 1 / sqrt(512 * 4000).
RECIPE = Recipe(
    epochs=23,
    batch_size=1024,
    optimizer="adamw",
    learning_rate=7e-4,
    schedule="inverse_sqrt",
    warmup_epochs=0.91,
    second_momentum=0.98,
    weight_decay=0.0,
    # Hu et al. (ICML 2024) report 6e-5 and 2e-4 for AdamW on GPT-2 of four sizes.
    lambda_w=6e-5,
    lambda_decoupled=0.02,
    label_smoothing=0.1,
)

# One seed: the Transformer's paper gives 12 hours on eight P100 GPUs for the base model.
COMPARED = Compared(seeds=(0,))


@offers(*TRANSFORMERS, default="transformer_base", dtypes=BOTH_DTYPES)
def task(options: Options = DEFAULTS, *, pieces: int = PIECES) -> Task:
    """Makes the WMT14 task.

    Args:
      options: model, recipe and the like; the batch size counts sentences.
      pieces: size of the vocabulary of both languages.

    Raises:
      MissingDatasetError: if the data set has not been prepared.
      ValueError: if the files that an earlier run stored do not fit.
    """
    folder = options.data_dir
    train, test = _Pairs(_open("train", folder)), _Pairs(_open("test", folder))
    kept = data_folder(folder) / DATASET.split("/")[0] / "sentencepiece"
    kept.mkdir(parents=True, exist_ok=True)
    vocabulary = _vocabulary(train, kept / f"de-en_{pieces}.model", pieces)
    name = f"{len(train)}_{TRAIN_LENGTH}_{vocabulary.fingerprint.replace(' ', '_')}"
    encoded = _encoded(train, vocabulary, kept / f"train_{name}.npz")
    test_pairs = encode_pairs(test, vocabulary, length=TEST_LENGTH)
    return translation_task(
        name="wmt14",
        size=TRANSFORMERS[options.model],
        vocabulary=vocabulary,
        train=encoded,
        test=test_pairs,
        texts=[test[int(index)] for index in test_pairs.kept],
        recipe=options.changed(RECIPE),
        metrics=(BLEU_METRIC, CHRF_METRIC),
        eval_batch_size=32,
        dtype=jnp.dtype(options.dtype),
        notes=(f"A vocabulary of {len(vocabulary):,} pieces for both languages.",),
        compared=COMPARED,
    )


class _Pairs:
    """English and German sentences of a split, read when asked for."""

    def __init__(self, source: Sequence[dict[str, Any]]) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[str, str]:
        example = self._source[index]
        return example["en"].decode(), example["de"].decode()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return (self[index] for index in range(len(self)))


def _open(split: str, data_dir: str | Path | None) -> Sequence[dict[str, Any]]:
    # Registers the data set, which tensorflow-datasets leaves to those who want it.
    import tensorflow_datasets.translate.wmt14  # noqa: F401

    imports = "--imports=tensorflow_datasets.translate.wmt14"
    return open_source(DATASET, split, data_dir=data_dir, build_options=imports)


def _vocabulary(train: _Pairs, path: Path, pieces: int) -> Vocabulary:
    if not path.exists():
        chosen = np.linspace(0, len(train) - 1, min(SAMPLE, len(train))).astype(int)
        vocabulary = train_vocabulary(_sides(train, chosen), pieces)
        write_whole(path, lambda part: part.write_bytes(vocabulary.model))
    return load_vocabulary(path, size=pieces)


def _sides(pairs: _Pairs, chosen: np.ndarray) -> Iterator[str]:
    for index in chosen:
        yield from pairs[int(index)]


def _encoded(train: _Pairs, vocabulary: Vocabulary, path: Path) -> EncodedPairs:
    """The training pairs as tokens, from the file of an earlier run where there is one."""
    if not path.exists():
        pairs = encode_pairs(train, vocabulary, length=TRAIN_LENGTH)
        write_whole(path, lambda part: _save(part, pairs))
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in EncodedPairs._fields}
    return EncodedPairs(
        **{**arrays, "empty": int(arrays["empty"]), "too_long": int(arrays["too_long"])}
    )


def _save(path: Path, pairs: EncodedPairs) -> None:
    arrays: dict[str, Any] = pairs._asdict()
    # Opened here, because `savez` appends .npz to a name that lacks it.
    with path.open("wb") as file:
        np.savez(file, **arrays)
