"""Data sets prepared by tensorflow-datasets: sequences of encoded images, or of examples.

Reading needs no TensorFlow; preparing a data set does, so that is left to the `tfds` command,
which the errors here spell out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import tensorflow_datasets as tfds
from PIL import Image

from experiments.data.images import decode_image

# What has to be in place before `tfds build` can do its work, where that is not just a network.
_MANUAL_STEPS = {
    "imagenet2012": (
        "imagenet2012 cannot be downloaded automatically: register at image-net.org and put "
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {data_dir}/downloads/manual "
        "(or name their folder with --manual_dir) first."
    ),
}


class MissingDatasetError(FileNotFoundError):
    """A data set, or a split of it, that has to be prepared first."""


class Record(TypedDict):
    """One example as stored.

    Attributes:
      encoded: a JPEG or PNG file.
      label: index of the class.
      name: where it came from, for messages.
    """

    encoded: bytes
    label: int
    name: str


@dataclass(frozen=True)
class ImageRecords:
    """A split of an image classification data set; `records[i]` is a `Record`.

    Attributes:
      source: a data source of tensorflow-datasets that leaves "image" encoded.
      origin: data set and split, for messages.
      name_feature: the feature that names an example.
    """

    source: Sequence[dict[str, Any]]
    origin: str
    name_feature: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        example = self.source[index]
        name = example[self.name_feature].decode(errors="replace")
        return Record(
            encoded=example["image"],
            label=int(example["label"]),
            name=f"{self.origin} example {index} ({name})",
        )


def open_images(
    dataset: str, split: str, *, name_feature: str, data_dir: str | Path | None = None
) -> ImageRecords:
    """Opens one split of an image data set in array_record format.

    Args:
      dataset: name in tensorflow-datasets, such as "cifar10".
      split: such as "train" or "validation".
      name_feature: the feature that names an example, such as "id".
      data_dir: folder of prepared data sets; by default $TFDS_DATA_DIR, or else
        ~/tensorflow_datasets.

    Returns:
      The records, in the order on disk.

    Raises:
      MissingDatasetError: if it is not there, or not in array_record format. The message names
        the folder and the command that prepares the data set.
    """
    source = open_source(
        dataset, split, decoders={"image": tfds.decode.SkipDecoding()}, data_dir=data_dir
    )
    return ImageRecords(source, f"{dataset}/{split}", name_feature)


def open_source(
    dataset: str,
    split: str,
    *,
    decoders: dict[str, Any] | None = None,
    data_dir: str | Path | None = None,
    build_options: str = "",
) -> Sequence[dict[str, Any]]:
    """Opens one split of any data set in array_record format.

    Args:
      dataset: name in tensorflow-datasets, with its configuration, such as "wmt14_translate/de-en".
      split: such as "train".
      decoders: of features that are not to be read in the usual way.
      data_dir: as for `open_images`.
      build_options: what the command that prepares this data set needs as well.

    Returns:
      The examples, in the order on disk.

    Raises:
      MissingDatasetError: as for `open_images`.
    """
    folder = data_folder(data_dir)
    command = f"{dataset} {build_options}".strip()
    versions = [info.parent for info in (folder / dataset).glob("*/dataset_info.json")]
    if not versions:
        raise _missing(command, folder, f"there is no {dataset} in {folder}")
    # By its files and not by its name: COCO's class cannot be made without TensorFlow.
    # Compared as versions: as text, 10.0.0 would come before 9.0.0.
    newest = max(versions, key=lambda version: tfds.core.Version(version.name))
    builder = tfds.builder_from_directory(newest)
    available = sorted(known.value for known in builder.info.available_file_formats())
    if "array_record" not in available:
        found = " and ".join(available)
        raise _missing(
            command,
            folder,
            f"{dataset} in {builder.data_dir} is in {found} format, and only array_record can be "
            "read without TensorFlow. Delete it or use another folder",
        )
    if split not in builder.info.splits:
        found = ", ".join(builder.info.splits) or "none"
        raise _missing(
            command, folder, f"{dataset} in {builder.data_dir} has no split {split!r}, only {found}"
        )
    source: Sequence[dict[str, Any]] = builder.as_data_source(
        split, decoders=decoders, file_format="array_record"
    )
    return source


def data_folder(data_dir: str | Path | None) -> Path:
    """The folder of prepared data sets: the one given, or $TFDS_DATA_DIR, or the usual one."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    # Absolute, so that the commands in errors work in any folder.
    return Path(chosen).expanduser().absolute()


def _missing(command: str, folder: Path, what: str) -> MissingDatasetError:
    dataset = command.split()[0]
    lines = [
        f"{what}. Prepare it with",
        f"  tfds build {command} --file_format=array_record --data_dir={folder}",
        "Preparing (not training) needs TensorFlow: pip install tensorflow. To read from another "
        "folder, give --data-dir or set TFDS_DATA_DIR.",
    ]
    if dataset in _MANUAL_STEPS:
        lines.append(_MANUAL_STEPS[dataset].format(data_dir=folder))
    return MissingDatasetError("\n".join(lines))


def decode(record: Record) -> Image.Image:
    """Decodes a record's image to RGB.

    Raises:
      ValueError: if it is not a readable image; the message names the record.
    """
    try:
        return decode_image(record["encoded"])
    except ValueError as error:
        raise ValueError(f"{record['name']}: {error}") from error
