"""Data sets in the real on-disk format, and what is said when they are not there."""

import numpy as np
import pytest

from experiments.data.records import MissingDatasetError, decode, open_images
from tests.experiments.prepared import cifar10_examples, imagenet2012_examples, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    train, test = list(cifar10_examples(23)), list(cifar10_examples(7, seed=1))
    prepare("cifar10", folder, {"train": train, "test": test}, shards=3)
    return folder


def test_every_example_comes_back(folder):
    records = open_images("cifar10", "train", name_feature="id", data_dir=folder)
    assert len(records) == 23
    assert len(list((folder / "cifar10" / "3.0.2").glob("*train*array_record*"))) == 3
    written = {example["id"]: example for example in cifar10_examples(23)}
    for index in range(23):
        record = records[index]
        example = written.pop(record["name"].split("(")[1].rstrip(")"))
        assert (record["encoded"], record["label"]) == (example["image"], example["label"])
    assert not written
    assert len(open_images("cifar10", "test", name_feature="id", data_dir=folder)) == 7


def test_folder_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    assert len(open_images("cifar10", "test", name_feature="id")) == 7


def test_tensorflow_is_not_imported(folder):
    import sys

    np.asarray(decode(open_images("cifar10", "train", name_feature="id", data_dir=folder)[0]))
    assert "tensorflow" not in sys.modules


def test_imagenet_images_keep_their_sizes(tmp_path):
    prepare("imagenet2012", tmp_path, {"validation": imagenet2012_examples(5)}, shards=1)
    records = open_images("imagenet2012", "validation", name_feature="file_name", data_dir=tmp_path)
    assert len({decode(records[i]).size for i in range(5)}) == 5
    with pytest.raises(MissingDatasetError, match="has no split 'train', only validation") as error:
        open_images("imagenet2012", "train", name_feature="file_name", data_dir=tmp_path)
    assert "ILSVRC2012_img_train.tar" in str(error.value)


def test_missing_dataset_names_folder_and_command(tmp_path):
    with pytest.raises(MissingDatasetError) as error:
        open_images("imagenet2012", "train", name_feature="file_name", data_dir=tmp_path)
    message = str(error.value)
    assert f"there is no imagenet2012 in {tmp_path}" in message
    command = f"tfds build imagenet2012 --file_format=array_record --data_dir={tmp_path}"
    assert command in message
    assert f"ILSVRC2012_img_val.tar into {tmp_path}/downloads/manual" in message
    assert "TensorFlow" in message
    # A folder that something else left behind is not a data set.
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    with pytest.raises(MissingDatasetError, match="there is no cifar10 in") as error:
        open_images("cifar10", "train", name_feature="id", data_dir=tmp_path)
    assert "tfds build cifar10" in str(error.value)
    assert "manual" not in str(error.value)


def test_home_folder_is_the_default(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(MissingDatasetError, match=str(tmp_path / "tensorflow_datasets")):
        open_images("cifar10", "train", name_feature="id")


def test_other_formats_are_refused_by_name(tmp_path):
    prepare("cifar10", tmp_path, {"train": cifar10_examples(4)}, shards=1)
    info = tmp_path / "cifar10" / "3.0.2" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(MissingDatasetError, match="is in tfrecord format, and only array_record"):
        open_images("cifar10", "train", name_feature="id", data_dir=tmp_path)


def test_a_broken_image_is_named(tmp_path):
    examples = [{**example, "image": b"\xff\xd8 oops"} for example in cifar10_examples(1)]
    prepare("cifar10", tmp_path, {"train": examples}, shards=1)
    records = open_images("cifar10", "train", name_feature="id", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"cifar10/train example 0 \(0_00000\): 7 bytes that are"):
        decode(records[0])
