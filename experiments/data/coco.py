"""COCO's images and boxes as tensorflow-datasets prepares them, in arrays of static shape.

Masks, which tensorflow-datasets does not keep, come from `experiments.data.coco_masks`.

Boxes are cut off at the image's border. A box with nothing left inside the image is
skipped, and so are objects with an empty mask and those beyond the number that an example has room
for; `count_boxes` counts all. An image without objects is an example like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import tensorflow_datasets as tfds
from numpy.typing import NDArray
from PIL import Image

from experiments.data.batches import Batch
from experiments.data.coco_masks import STRIDE, CocoMasks, Outline, open_masks, sample_masks
from experiments.data.images import decode_image
from experiments.data.records import open_source

DATASET = "coco/2017"
# COCO's own category numbers have gaps and run to 90; tensorflow-datasets counts without gaps.
CLASSES = 81  # the background and 80 categories
# Boxes with a shorter side, in pixels of the original image, are skipped.
_SHORTEST_SIDE = 1.0


class CocoRecord(TypedDict):
    """An image as it is stored.

    Attributes:
      encoded: JPEG.
      boxes: (n, 4): top, left, bottom, right, as fractions of the image.
      labels: (n,) from 0.
      is_crowd: (n,) booleans.
      outlines: n masks; None where only boxes are read.
      name: for messages.
    """

    encoded: bytes
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    is_crowd: NDArray[np.bool_]
    outlines: list[Outline] | None
    name: str


@dataclass(frozen=True)
class CocoRecords:
    """One split of COCO, by number.

    Attributes:
      source: of tensorflow-datasets.
      origin: the split's name, for messages.
      masks: of the same split; None to read boxes only.
    """

    source: Sequence[dict[str, Any]]
    origin: str
    masks: CocoMasks | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> CocoRecord:
        example = self.source[index]
        objects = example["objects"]
        file_name = example["image/filename"].decode(errors="replace")
        name = f"{self.origin} example {index} ({file_name})"
        outlines = None
        if self.masks is not None:
            numbers = np.asarray(objects["id"]).reshape(-1)
            outlines = self.masks.find(int(example["image/id"]), numbers.tolist(), name)
        return CocoRecord(
            encoded=example["image"],
            boxes=np.asarray(objects["bbox"], np.float32).reshape(-1, 4),
            labels=np.asarray(objects["label"]).reshape(-1),
            is_crowd=np.asarray(objects["is_crowd"], bool).reshape(-1),
            outlines=outlines,
            name=name,
        )


def open_coco(
    split: str, data_dir: str | Path | None = None, *, with_masks: bool = False
) -> CocoRecords:
    """Opens a split of COCO 2017 in array_record format.

    Args:
      split: "train" or "validation".
      data_dir: as for `experiments.data.records.open_images`.
      with_masks: whether COCO's own annotations are read too; see `open_masks`.

    Raises:
      MissingDatasetError: it has not been prepared, or the masks are missing; says how to get them.
      ValueError: the annotations are damaged.
    """
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = open_source(DATASET, split, decoders=decoders, data_dir=data_dir)
    masks = open_masks(split, data_dir) if with_masks else None
    return CocoRecords(source, f"{DATASET}/{split}", masks)


def as_arrays(record: CocoRecord, size: int, most: int, *, mirrored: bool = False) -> Batch:
    """Decodes an image, scales its longer side to `size` and pads it to a square.

    Args:
      record: see `CocoRecord`.
      size: of the square's sides; with masks a multiple of `STRIDE`.
      most: objects that there is room for; the largest ones are kept.
      mirrored: whether left and right are swapped.

    Returns:
      "image" (size, size, 3) float32 in [-1, 1], zeros where padded; "boxes" (most, 4) float32;
      "classes" (most,) int32, 0 where padded; "is_crowd" (most,) int32; and where the record has
      outlines "masks" (most, size / STRIDE, size / STRIDE) uint8.

    Raises:
      ValueError: the image cannot be read, a label does not exist, or masks are of an image of
        another size; the message names it.
    """
    try:
        image = decode_image(record["encoded"])
    except ValueError as error:
        raise ValueError(f"{record['name']}: {error}") from error
    if len(record["labels"]) and not 0 <= record["labels"].min() <= record["labels"].max() < 80:
        raise ValueError(f"{record['name']} has labels beyond 0 to 79: {record['labels']}")
    boxes, kept = usable_boxes(record, image.width, image.height)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    scaled = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    # Not `scale`: sides are rounded to whole pixels, and boxes have to fit those.
    boxes = boxes * np.array([width / image.width, height / image.height] * 2)
    if mirrored:
        # Before padding, which stays at the right and at the bottom.
        scaled = scaled[:, ::-1]
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    sides = boxes[:, 2:] - boxes[:, :2]
    largest = np.argsort(-sides.prod(axis=1), kind="stable")[:most]
    missing = most - len(largest)
    # Padding is 0, which is medium gray in [-1, 1].
    pixels = np.zeros((size, size, 3), np.float32)
    pixels[:height, :width] = scaled / np.float32(127.5) - 1
    arrays = {
        "image": pixels,
        "boxes": np.pad(boxes[largest], ((0, missing), (0, 0))).astype(np.float32),
        "classes": np.pad(record["labels"][kept][largest] + 1, (0, missing)).astype(np.int32),
        "is_crowd": np.pad(record["is_crowd"][kept][largest], (0, missing)).astype(np.int32),
    }
    if record["outlines"] is not None:
        outlines = [record["outlines"][index] for index in np.flatnonzero(kept)[largest]]
        masks = sample_masks(outlines, (height, width), size // STRIDE, mirrored=mirrored)
        arrays["masks"] = np.pad(masks, ((0, missing), (0, 0), (0, 0)))
    return arrays


def usable_boxes(
    record: CocoRecord, width: int, height: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes in pixels, cut off at the border, and which of the record's those are.

    Where there are masks, objects with an empty one are left out.

    Args:
      record: see `CocoRecord`.
      width: of its image.
      height: of its image.

    Returns:
      (kept, 4): left, top, right, bottom; and (n,) booleans.

    Raises:
      ValueError: masks are of an image of another size; the message names it.
    """
    # tensorflow-datasets puts y before x.
    corners = np.clip(record["boxes"][:, [1, 0, 3, 2]].astype(float), 0, 1)
    boxes = corners * np.array([width, height, width, height])
    # NaN compares as False, so that it is skipped too.
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= _SHORTEST_SIDE).all(axis=1)
    for index, outline in enumerate(record["outlines"] or ()):
        if outline.size != (height, width):
            raise ValueError(
                f"{record['name']} has {height} x {width} pixels, but its masks {outline.size}"
            )
        kept[index] &= not outline.is_empty()
    return boxes[kept], kept


def count_boxes(records: CocoRecords, most: int) -> str:
    """Says how many objects a split has, and how many of them are left out."""
    whole, outside, beyond, empty, unseen = 0, 0, 0, 0, 0
    for index in range(len(records)):
        record = records[index]
        image = decode_size(record)
        _, kept = usable_boxes(record, *image)
        whole += len(kept)
        outside += int((~kept).sum())
        beyond += max(0, int(kept.sum()) - most)
        empty += not kept.any()
        unseen += sum(outline.is_empty() for outline in record["outlines"] or ())
    by_mask = f" ({unseen:,} have an empty mask)" if records.masks is not None else ""
    return (
        f"{records.origin}: {len(records):,} images, {empty:,} of them without objects; "
        f"{whole:,} objects, {outside:,} skipped as empty or outside of their image{by_mask}, "
        f"{beyond:,} beyond {most} an image."
    )


def decode_size(record: CocoRecord) -> tuple[int, int]:
    """Width and height of a record's image.

    Raises:
      ValueError: the image cannot be read; the message names it.
    """
    try:
        return decode_image(record["encoded"]).size
    except ValueError as error:
        raise ValueError(f"{record['name']}: {error}") from error
