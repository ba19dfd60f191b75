"""COCO's records as arrays: scaled, padded, mirrored; what is outside of an image is skipped."""

import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data.coco import CocoRecords, as_arrays, count_boxes, open_coco, usable_boxes
from experiments.tasks.coco import train_example
from tests.experiments.prepared import encode


def stored(boxes, labels, *, width=40, height=20, crowd=None, image=None):
    """An example as tensorflow-datasets gives it."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    return {
        "image": encode(pixels, "JPEG") if image is None else image,
        "image/filename": b"000000000007.jpg",
        "objects": {
            "bbox": np.array(boxes, np.float32).reshape(-1, 4),
            "label": np.array(labels, np.int64),
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
                label = {"id": 1, "area": 7, "bbox": box, "label": 4, "is_crowd": False}
                pixels = np.full((20, 40, 3), 50 * index, np.uint8)
                yield (
                    index,
                    {
                        "image": io.BytesIO(encode(pixels, "JPEG")),
                        "image/filename": f"{index:012d}.jpg",
                        "image/id": index,
                        # The second has two objects, the first none.
                        "objects": [label] * (2 * (index == 1)),
                    },
                )


def test_what_is_on_disk_is_read_without_tensorflow(tmp_path):
    builder = Coco(data_dir=tmp_path, config="2017", file_format="array_record")
    builder.download_and_prepare()
    train, validation = open_coco("train", tmp_path), open_coco("validation", tmp_path)
    assert (len(train), len(validation)) == (3, 2)
    found = sorted((as_arrays(train[i], 80, 3) for i in range(3)), key=lambda a: a["classes"].sum())
    assert [arrays["classes"].tolist() for arrays in found] == [[0] * 3, [0] * 3, [5, 5, 0]]
    assert found[2]["boxes"][0].tolist() == pytest.approx([20, 8, 60, 24])
    assert "2 images, 1 of them without objects; 2 objects" in count_boxes(validation, 3)
    assert "tensorflow" not in sys.modules


def records(*examples):
    return CocoRecords(examples, "coco/2017/validation")


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


def test_crowds_are_not_learnt():
    record = records(stored([WHOLE, [0, 0, 1, 1]], [0, 1], crowd=[False, True]))[0]
    batch = train_example(record, np.random.default_rng(0), size=64)
    assert sorted(batch["classes"][:2].tolist()) == [0, 1]
    assert set(batch) == {"image", "boxes", "classes"}


def test_damaged_examples_are_named():
    broken = records(stored([WHOLE], [0], image=b"\xff\xd8 no image"))
    for use in (lambda: as_arrays(broken[0], 40, 1), lambda: count_boxes(broken, 1)):
        with pytest.raises(ValueError, match=r"example 0 \(000000000007\.jpg\)"):
            use()
    with pytest.raises(ValueError, match="labels beyond 0 to 79"):
        as_arrays(records(stored([WHOLE], [80]))[0], 40, 1)
