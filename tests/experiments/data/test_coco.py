"""COCO's records as arrays: scaled, padded, mirrored; what is outside of an image is skipped."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data.coco import CocoRecords, as_arrays, count_boxes, open_coco, usable_boxes
from experiments.data.coco_masks import CocoMasks
from experiments.tasks import coco as module
from experiments.tasks.coco import make_network, train_example
from experiments.tasks.options import Options
from experiments.training.flags import Flags, make_task
from tests.experiments.data.test_coco_masks import (
    RECTANGLE,
    annotation,
    in_a_list,
    outline,
    rectangle,
)
from tests.experiments.data.test_coco_masks import write as write_masks
from tests.experiments.models.detection.test_mask_rcnn import (
    NORMALIZATION,
    TINY,
    TORCHVISION,
    count,
    shapes,
)
from tests.experiments.prepared import encode


def stored(boxes, labels, *, width=40, height=20, crowd=None, image=None, numbers=None):
    """An example as tensorflow-datasets gives it."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    return {
        "image": encode(pixels, "JPEG") if image is None else image,
        "image/filename": b"000000000007.jpg",
        "image/id": 7,
        "objects": {
            "bbox": np.array(boxes, np.float32).reshape(-1, 4),
            "label": np.array(labels, np.int64),
            "id": np.array(range(len(labels)) if numbers is None else numbers, np.int64),
            "is_crowd": np.array(crowd if crowd is not None else [False] * len(labels)),
        },
    }


with tfds.core.registered.skip_registration():

    class Coco(tfds.core.GeneratorBasedBuilder):
        """Writes what tensorflow-datasets' own class writes, which needs TensorFlow."""

        BUILDER_CONFIGS = (
            tfds.core.BuilderConfig(name="2017", version=tfds.core.Version("1.1.0")),
        )

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "image/filename": tfds.features.Text(),
                "image/id": np.int64,
                "objects": tfds.features.Sequence(
                    {
                        "id": np.int64,
                        "area": np.int64,
                        "bbox": tfds.features.BBoxFeature(),
                        "label": tfds.features.ClassLabel(num_classes=80),
                        "is_crowd": np.bool_,
                    }
                ),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(3), "validation": self._generate_examples(2)}

        def _generate_examples(self, count):
            for index in range(count):
                box = tfds.features.BBox(ymin=0.2, xmin=0.25, ymax=0.6, xmax=0.75)
                label = {"area": 7, "bbox": box, "label": 4, "is_crowd": False}
                pixels = np.full((20, 40, 3), 50 * index, np.uint8)
                yield (
                    index,
                    {
                        "image": io.BytesIO(encode(pixels, "JPEG")),
                        "image/filename": f"{index:012d}.jpg",
                        "image/id": index,
                        # The second has two objects, the first none.
                        "objects": [{**label, "id": 10}, {**label, "id": 11}] * (index == 1),
                    },
                )


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """The data set in a folder, with masks."""
    folder = tmp_path_factory.mktemp("data")
    Coco(data_dir=folder, config="2017", file_format="array_record").download_and_prepare()
    for split in ("train", "val"):
        objects = [
            annotation(10, RECTANGLE, image=1),
            annotation(11, in_a_list(rectangle(12, 4, 20, 12)), image=1),
        ]
        write_masks(folder, objects, split=split, images=range(3))
    return folder


def test_what_is_on_disk_is_read_without_tensorflow(on_disk):
    train, validation = open_coco("train", on_disk), open_coco("validation", on_disk)
    assert (len(train), len(validation)) == (3, 2)
    found = sorted((as_arrays(train[i], 80, 3) for i in range(3)), key=lambda a: a["classes"].sum())
    assert [arrays["classes"].tolist() for arrays in found] == [[0] * 3, [0] * 3, [5, 5, 0]]
    assert found[2]["boxes"][0].tolist() == pytest.approx([20, 8, 60, 24])
    assert "2 images, 1 of them without objects; 2 objects" in count_boxes(validation, 3)
    assert "tensorflow" not in sys.modules
    assert all("masks" not in arrays for arrays in found)


def test_masks_are_joined_with_the_boxes_on_disk(on_disk):
    train = open_coco("train", on_disk, with_masks=True)
    found = [as_arrays(train[index], 160, 3) for index in range(3)]
    (arrays,) = (one for one in found if one["classes"].any())
    # 20 x 40 pixels, enlarged by four: the masks have the original's.
    expected = np.zeros((3, 40, 40), np.uint8)
    expected[0, :20] = rectangle(10, 4, 30, 12)
    expected[1, :20] = rectangle(12, 4, 20, 12)
    np.testing.assert_array_equal(arrays["masks"], expected)
    assert all(one["masks"].shape == (3, 40, 40) for one in found)
    assert "(0 have an empty mask)" in count_boxes(train, 3)


def records(*examples, masks=None):
    return CocoRecords(examples, "coco/2017/validation", masks)


def drawn(*masks):
    """The masks of a split whose objects are numbered from 0."""
    return CocoMasks(Path("drawn.json"), {index: outline(one) for index, one in enumerate(masks)})


# Top, left, bottom, right, as fractions: 4 to 12 rows and 10 to 30 columns of 20 x 40.
WHOLE = [0.2, 0.25, 0.6, 0.75]


def test_boxes_are_scaled_with_the_longer_side():
    arrays = as_arrays(records(stored([WHOLE], [4]))[0], size=80, most=3)
    assert arrays["boxes"].tolist() == [[20, 8, 60, 24], [0] * 4, [0] * 4]
    assert arrays["classes"].tolist() == [5, 0, 0]
    assert arrays["image"].shape == (80, 80, 3)
    assert abs(arrays["image"][:40]).max() < 0.02
    assert (arrays["image"][40:] == 0).all()
    portrait = as_arrays(records(stored([WHOLE], [4], width=20, height=40))[0], size=80, most=1)
    assert portrait["boxes"].tolist() == [[10, 16, 30, 48]]


def test_mirrored_boxes_stay_with_their_objects():
    record = records(stored([[0.0, 0.0, 0.5, 0.25]], [0]))[0]
    arrays = as_arrays(record, size=40, most=1, mirrored=True)
    assert arrays["boxes"].tolist() == [[30, 0, 40, 10]]


def test_boxes_outside_are_cut_off_or_skipped():
    boxes = [[-0.5, 0.5, 0.5, 1.5], [0.2, 1.1, 0.4, 1.3], [0.5, 0.5, 0.5, 0.9], [np.nan] * 4]
    record = records(stored(boxes, [0, 1, 2, 3]))[0]
    kept, which = usable_boxes(record, 40, 20)
    assert which.tolist() == [True, False, False, False]
    assert kept.tolist() == [[20, 0, 40, 10]]


def test_images_without_objects_are_examples_too():
    arrays = as_arrays(records(stored([], []))[0], size=40, most=2)
    assert arrays["classes"].tolist() == [0, 0]
    assert (arrays["boxes"] == 0).all()


def test_the_largest_objects_are_kept():
    boxes = [[0, 0, 0.1, 0.1], [0, 0, 0.5, 0.5], [0, 0, 0.9, 0.9]]
    arrays = as_arrays(records(stored(boxes, [0, 1, 2]))[0], size=40, most=2)
    assert arrays["classes"].tolist() == [3, 2]


def test_what_is_left_out_is_counted():
    some = [WHOLE, [0, 1.2, 1, 1.4], [0, 0, 0.5, 0.5]]
    note = count_boxes(records(stored(some, [0, 1, 2]), stored([], [])), most=1)
    assert "2 images, 1 of them without objects" in note
    assert "3 objects, 1 skipped as empty or outside of their image, 1 beyond 1 an image" in note


def test_masks_are_scaled_mirrored_and_sorted_with_their_boxes():
    boxes = [[0.0, 0.0, 0.4, 0.2], WHOLE]
    masks = drawn(rectangle(0, 0, 8, 8), rectangle(10, 4, 30, 12))
    record = records(stored(boxes, [0, 1]), masks=masks)[0]
    for mirrored in (False, True):
        arrays = as_arrays(record, size=80, most=2, mirrored=mirrored)
        assert arrays["classes"].tolist() == [2, 1]
        assert arrays["masks"].shape == (2, 20, 20)
        for box, mask in zip(arrays["boxes"], arrays["masks"], strict=True):
            left, top, right, bottom = (box / 4).astype(int)
            expected = np.zeros((20, 20))
            expected[top:bottom, left:right] = 1
            np.testing.assert_array_equal(mask, expected)
    # With most of one, the smaller is left out.
    assert as_arrays(record, size=80, most=1)["masks"].sum() == 10 * 4


def test_objects_with_an_empty_mask_are_skipped_and_counted():
    masks = drawn(rectangle(0, 0, 0, 0), rectangle(10, 4, 30, 12), rectangle(0, 0, 0, 0))
    some = records(stored([WHOLE, WHOLE, [0, 1.2, 1, 1.4]], [0, 1, 2]), masks=masks)
    assert as_arrays(some[0], size=80, most=3)["classes"].tolist() == [2, 0, 0]
    note = count_boxes(some, most=3)
    assert "3 objects, 2 skipped as empty or outside of their image (2 have an empty mask)" in note


def test_masks_of_images_of_another_size_are_refused():
    masks = drawn(np.ones((40, 20)))
    with pytest.raises(ValueError, match=r"7\.jpg\) has 20 x 40 pixels, but its masks \(40, 20\)"):
        as_arrays(records(stored([WHOLE], [0]), masks=masks)[0], size=80, most=1)


def test_crowds_are_not_learnt():
    record = records(stored([WHOLE, [0, 0, 1, 1]], [0, 1], crowd=[False, True]))[0]
    batch = train_example(record, np.random.default_rng(0), size=64)
    assert sorted(batch["classes"][:2].tolist()) == [0, 1]
    assert set(batch) == {"image", "boxes", "classes"}
    masks = drawn(rectangle(10, 4, 30, 12), rectangle(0, 0, 40, 20))
    record = records(stored([WHOLE, [0, 0, 1, 1]], [0, 1], crowd=[False, True]), masks=masks)[0]
    batch = train_example(record, np.random.default_rng(0), size=64)
    assert batch["masks"].shape == (100, 16, 16)
    # The crowd is the larger one.
    assert batch["classes"][:2].tolist() == [0, 1]


def test_damaged_examples_are_named():
    broken = records(stored([WHOLE], [0], image=b"\xff\xd8 no image"))
    for use in (lambda: as_arrays(broken[0], 40, 1), lambda: count_boxes(broken, 1)):
        with pytest.raises(ValueError, match=r"example 0 \(000000000007\.jpg\)"):
            use()
    with pytest.raises(ValueError, match="labels beyond 0 to 79"):
        as_arrays(records(stored([WHOLE], [80]))[0], 40, 1)


@pytest.mark.parametrize("model", ["faster_rcnn", "mask_rcnn"])
def test_networks_are_the_published_ones_with_ten_classes_less(model):
    network = make_network(model)
    # A class and a box of five numbers from 1,024 units and a bias; a mask from 256 and a bias.
    fewer = 10 * (5 * 1025 + 257 * network.with_masks)
    published = TORCHVISION[network.with_masks] + NORMALIZATION
    assert count(shapes(network)["params"]) == published - fewer


def test_the_model_decides_whether_masks_are_read(on_disk, tmp_path):
    flags = Flags(task="coco", data_dir=on_disk, batch_size=2, threads=0)
    plain = make_task(flags)
    assert [metric.name for metric in plain.metrics] == ["box AP", "box AP50"]
    assert "masks" not in next(plain.train_batches(0, 0))
    task = make_task(replace(flags, model="mask_rcnn"))
    assert [metric.name for metric in task.metrics][2:] == ["mask AP", "mask AP50"]
    assert next(task.train_batches(0, 0))["masks"].shape == (2, 100, 256, 256)
    with pytest.raises(ValueError, match="'mask_rcnn_tiny'; choose from faster_rcnn"):
        make_task(replace(flags, model="mask_rcnn_tiny"))
    with pytest.raises(ValueError, match="mask_rcnn computes in float32, got bfloat16"):
        make_task(replace(flags, model="mask_rcnn", dtype="bfloat16"))


@pytest.mark.slow
def test_a_tiny_mask_rcnn_takes_a_step_and_is_scored(on_disk, monkeypatch):
    tiny = replace(TINY, classes=81)
    monkeypatch.setattr(module, "make_network", lambda model: tiny)
    monkeypatch.setattr(module, "_EVAL_BATCH", 3)
    monkeypatch.setattr(module, "MOST_OBJECTS", 5)
    options = Options(model="mask_rcnn", batch_size=3, data_dir=on_disk, threads=0)
    task = module.task(options, size=64)
    variables = jax.jit(task.init)(jax.random.key(0))
    params = variables.pop("params")

    @jax.jit
    def step(params, batch):
        run = jax.value_and_grad(task.loss, has_aux=True)
        (loss, _), grads = run(params, variables, batch, jax.random.key(0))
        return loss, jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

    batch = next(task.train_batches(0, 0))
    assert batch["masks"].any()
    losses = []
    for _ in range(3):
        loss, params = step(params, batch)
        losses.append(float(loss))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    (batch,) = task.eval_batches()
    assert batch["valid"].tolist() == [1, 1, 0]
    seen = jax.device_get(jax.jit(task.predict)(params, variables, batch))
    kept = {name: batch[name] for name in ("valid", *task.scored_by)}
    scores = task.score([kept], [seen])
    assert {metric.name for metric in task.metrics} <= set(scores)
