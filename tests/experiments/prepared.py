"""Small data sets in the on-disk format that `tfds build --file_format=array_record` leaves.

The real builders write them, with the real features and file names; only the examples are
generated here, because the real ones have to be downloaded.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def encode(pixels, image_format):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


def prepare(dataset, folder, splits, *, shards=2, file_format="array_record"):
    """Writes `splits`, split name -> examples with "image" as encoded bytes."""

    def keyed(examples):
        for index, example in enumerate(examples):
            yield index, {**example, "image": io.BytesIO(example["image"])}

    builder = tfds.builder(dataset, data_dir=folder, file_format=file_format)
    builder._split_generators = lambda *_: {name: keyed(rows) for name, rows in splits.items()}
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
    return folder


def cifar10_examples(count, *, seed=0):
    """Images whose brightness gives away the label, so that a few steps can learn something."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        noise = rng.integers(0, 20, (32, 32, 3))
        pixels = (noise + 22 * (index % 10)).astype(np.uint8)
        yield {
            "id": f"{seed}_{index:05d}",
            "image": encode(pixels, "PNG"),
            "label": index % 10,
        }


def imagenet2012_examples(count, *, seed=0):
    """Color gradients of many sizes."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        height, width = rng.integers(120, 400, size=2)
        rows, columns = np.mgrid[0:height, 0:width]
        gray = 255 * (rows / height + columns / width) / 2
        pixels = np.stack([gray, gray[::-1], gray[:, ::-1]], axis=-1).astype(np.uint8)
        yield {
            "file_name": f"n{seed:08d}_{index}.JPEG",
            "image": encode(pixels, "JPEG"),
            "label": index % 1000,
        }


def prepare_sentences(folder, splits):
    """Writes WMT14's English and German, split name -> pairs."""
    import tensorflow_datasets.translate.wmt14  # noqa: F401

    def keyed(pairs):
        for index, (english, german) in enumerate(pairs):
            yield index, {"en": english, "de": german}

    builder = tfds.builder("wmt14_translate/de-en", data_dir=folder, file_format="array_record")
    builder._split_generators = lambda *_: {name: keyed(rows) for name, rows in splits.items()}
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=1))
    return folder
