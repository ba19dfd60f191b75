"""WMT14 from a small data set in the real on-disk format."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.data.records import MissingDatasetError
from experiments.models.text.transformer import TRANSFORMERS, Size
from experiments.tasks import wmt14
from experiments.tasks.number_names import names
from experiments.tasks.options import Options
from tests.experiments.prepared import prepare_sentences

OPTIONS = Options(batch_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wmt")
    train = [*names(range(60)), ("", "leer"), ("one " * 70, "lang")]
    return prepare_sentences(folder, {"train": train, "test": names(range(100, 112))})


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(TRANSFORMERS, "transformer_base", Size(16, 32, 2, 1))


def test_batches_from_disk(folder):
    task = wmt14.task(replace(OPTIONS, data_dir=folder), pieces=80)
    assert task.steps_per_epoch == 60 // 8
    batch = next(task.train_batches(0, 0))
    assert batch["source"].shape == (8, 64)
    (test,) = task.eval_batches()
    assert test["valid"].sum() == 12
    assert test["source"].shape == (32, 256)
    assert "60 training pairs" in task.notes[1]
    assert "1 with an empty side, 1 too long" in task.notes[1]
    shown = jax.eval_shape(task.init, jax.random.key(0))["params"]["tokens"]["embedding"]
    assert shown["embedding"].shape == (80, 16)
    assert task.score([test], [test["target"]])["exact match"] == 1


def test_what_the_first_run_kept_is_used_again(folder, monkeypatch):
    first = wmt14.task(replace(OPTIONS, data_dir=folder), pieces=80)
    kept = folder / "wmt14_translate" / "sentencepiece"
    assert {path.suffix for path in kept.iterdir()} == {".model", ".npz"}
    monkeypatch.setattr(wmt14, "train_vocabulary", None)
    again = wmt14.task(replace(OPTIONS, data_dir=folder), pieces=80)
    assert again.identity == first.identity
    for name, values in next(first.train_batches(0, 0)).items():
        np.testing.assert_array_equal(values, next(again.train_batches(0, 0))[name])


def test_a_vocabulary_of_another_size_is_refused(folder):
    wmt14.task(replace(OPTIONS, data_dir=folder), pieces=80)
    kept = folder / "wmt14_translate" / "sentencepiece"
    (kept / "de-en_70.model").write_bytes((kept / "de-en_80.model").read_bytes())
    with pytest.raises(ValueError, match="has 80 pieces, expected 70: delete it"):
        wmt14.task(replace(OPTIONS, data_dir=folder), pieces=70)


def test_the_recipe_is_the_transformers():
    recipe = wmt14.RECIPE
    steps = recipe.epochs * 4_500_000 // recipe.batch_size
    assert steps == pytest.approx(100_000, rel=0.02)
    warmup = recipe.warmup_epochs * 4_500_000 / recipe.batch_size
    assert warmup == pytest.approx(4000, rel=0.01)
    assert recipe.learning_rate == pytest.approx((512 * 4000) ** -0.5, rel=0.01)
    assert (recipe.label_smoothing, recipe.momentum, recipe.second_momentum) == (0.1, 0.9, 0.98)


def test_a_missing_data_set_says_how_to_prepare_it(tmp_path):
    with pytest.raises(MissingDatasetError, match="there is no wmt14_translate/de-en") as error:
        wmt14.task(Options(data_dir=tmp_path))
    assert (
        "tfds build wmt14_translate/de-en --imports=tensorflow_datasets.translate.wmt14 "
        f"--file_format=array_record --data_dir={tmp_path}"
    ) in str(error.value)
