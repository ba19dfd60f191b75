"""CIFAR-10 and ImageNet from small data sets in the real on-disk format."""

import dataclasses

import numpy as np
import pytest

from experiments.data.records import MissingDatasetError
from experiments.tasks import cifar10, imagenet2012
from experiments.tasks.options import Options
from experiments.training.flags import Flags, make_job
from experiments.training.job import plan_of
from tests.experiments.prepared import cifar10_examples, imagenet2012_examples, prepare


@pytest.fixture(scope="module")
def cifar_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    return prepare(
        "cifar10", folder, {"train": cifar10_examples(70), "test": cifar10_examples(23, seed=1)}
    )


@pytest.fixture(scope="module")
def imagenet_folder(tmp_path_factory):
    return prepare(
        "imagenet2012",
        tmp_path_factory.mktemp("imagenet"),
        {"train": imagenet2012_examples(9), "validation": imagenet2012_examples(5, seed=1)},
    )


def test_cifar10_batches(cifar_folder):
    task = cifar10.task(Options(model="resnet8", batch_size=16, data_dir=cifar_folder))
    batches = list(task.train_batches(0, 0))
    assert len(batches) == task.steps_per_epoch == 4
    assert {(b["image"].shape, b["image"].dtype.name) for b in batches} == {
        ((16, 32, 32, 3), "float32")
    }
    assert {b["label"].dtype.name for b in batches} == {"int32"}
    again, other = list(task.train_batches(0, 0)), list(task.train_batches(0, 1))
    for name in ("image", "label"):
        np.testing.assert_array_equal(batches[0][name], again[0][name])
    assert (batches[0]["image"] != other[0]["image"]).any()


def test_cifar10_evaluation_is_the_normalized_image(cifar_folder):
    task = cifar10.task(Options(model="resnet8", batch_size=16, data_dir=cifar_folder))
    batches = list(task.eval_batches())
    assert [int(b["valid"].sum()) for b in batches] == [16, 7]
    # The brightness of the generated images follows from the label.
    for batch in batches:
        pixels = batch["image"] * [0.2470, 0.2435, 0.2616] + [0.4914, 0.4822, 0.4465]
        level = 255 * pixels.mean(axis=(1, 2, 3))
        expected = 22 * batch["label"] + 9.5
        assert np.abs(level - expected)[batch["valid"] == 1].max() < 1
    halves = list(task.eval_rows(rows_of=lambda size: np.arange(size // 2, size)))
    np.testing.assert_array_equal(halves[0]["image"], batches[0]["image"][8:])
    assert not halves[1]["valid"].any()


def test_imagenet_batches(imagenet_folder):
    task = imagenet2012.task(Options(model="resnet18", batch_size=4, data_dir=imagenet_folder))
    assert task.steps_per_epoch == 2
    batches = list(task.train_batches(0, 0)) + list(task.eval_batches())
    assert {(b["image"].shape, b["image"].dtype.name) for b in batches} == {
        ((4, 224, 224, 3), "float32")
    }
    assert [int(b["valid"].sum()) for b in batches[2:]] == [4, 1]
    labels = np.concatenate([b["label"] for b in batches[:2]])
    assert len(set(labels.tolist())) == 8
    # Normalized: between (0 - mean) / std and (1 - mean) / std, give or take the lighting.
    for batch in batches:
        assert -2.7 < batch["image"].min() < -0.5
        assert 0.5 < batch["image"].max() < 3.2


def test_imagenet_task_has_the_recipe_of_the_paper(imagenet_folder):
    recipe = imagenet2012.RECIPE
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (120, 256, 0.1)
    assert (recipe.momentum, recipe.weight_decay, recipe.lambda_w) == (0.9, 5e-5, 2e-4)
    assert recipe.warmup_epochs == 5
    task = imagenet2012.task(Options(model="resnet50", batch_size=2, data_dir=imagenet_folder))
    plan = plan_of(task, "2:4")
    # Every convolution but the stem; the head, norms and biases stay dense.
    assert len(plan) == 52
    assert {name for name in plan.dense if name.endswith("kernel")} == {
        "stem/kernel",
        "head/kernel",
    }


def test_blocks_on_imagenet_train_by_the_recipe_and_with_the_dense_layers_of_subp(imagenet_folder):
    recipe = imagenet2012.BLOCK_RECIPE
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (250, 512, 0.1)
    assert (recipe.warmup_epochs, recipe.momentum, recipe.label_smoothing) == (0, 0.9, 0.1)
    assert (recipe.weight_decay, recipe.decay_vectors, recipe.lambda_w) == (1e-4, False, 2e-4)
    assert [round(share * recipe.epochs, 9) for share in recipe.ramp] == [10, 180]
    flags = Flags(
        task="imagenet2012",
        model="mobilenet_v1",
        pattern="1x16@0.5390625",
        method="subp",
        batch_size=2,
        data_dir=imagenet_folder,
    )
    job = make_job(flags)
    assert job.task.recipe == dataclasses.replace(recipe, batch_size=2)
    assert len(job.plan) == 13
    plan = make_job(dataclasses.replace(flags, model="resnet18")).plan
    assert len(plan) == 16
    assert plan.dense["stage2_block1/shortcut/kernel"] == "excluded by '/shortcut/'"
    changed = dataclasses.replace(flags, label_smoothing=0.2, ramp=(0.1, 0.5), decay_vectors=True)
    recipe = make_job(changed).task.recipe
    assert (recipe.label_smoothing, recipe.ramp, recipe.decay_vectors) == (0.2, (0.1, 0.5), True)
    assert make_job(dataclasses.replace(flags, pattern="2:4", method="ste")).task.recipe == (
        dataclasses.replace(imagenet2012.RECIPE, batch_size=2)
    )


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (cifar10.task, "cifar10"),
        (imagenet2012.task, "imagenet2012"),
    ],
)
def test_missing_data_sets_say_how_to_prepare_them(make, name, tmp_path):
    with pytest.raises(MissingDatasetError, match=f"tfds build {name} --file_format=array_record"):
        make(Options(data_dir=tmp_path))


def test_a_batch_larger_than_the_data_set(cifar_folder):
    with pytest.raises(ValueError, match="batch_size must be from 1 to 70 examples, got 128"):
        cifar10.task(Options(model="resnet8", data_dir=cifar_folder))
