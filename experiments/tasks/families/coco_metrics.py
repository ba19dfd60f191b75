"""COCO's average precision of boxes and masks, by pycocotools.

Source: Lin et al., "Microsoft COCO", ECCV 2014; cocodataset.org, "Detection Evaluation".
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Kind = Literal["bbox", "segm"]

# Where pycocotools keeps them among its twelve numbers.
_PLACES = {"AP": 0, "AP50": 1, "AP75": 2}


@dataclass(frozen=True)
class Annotated:
    """The objects of one image, true or found.

    Attributes:
      size: (height, width) of the image.
      boxes: (n, 4): left, top, right, bottom, in pixels.
      classes: (n,) from 1.
      scores: (n,); None for true objects.
      masks: (n, height / k, width / k) booleans, of any whole k that is the same for all images;
        None where only boxes are compared.
      is_crowd: (n,) marks regions that detections are neither rewarded nor punished in; None for
        none.
    """

    size: tuple[int, int]
    boxes: NDArray[Any]
    classes: NDArray[Any]
    scores: NDArray[Any] | None = None
    masks: NDArray[Any] | None = None
    is_crowd: NDArray[Any] | None = None


def average_precision(
    truth: Iterable[Annotated], found: Iterable[Annotated], kind: Kind
) -> dict[str, float]:
    """Returns "AP" (mean over overlaps of 0.5, 0.55, ... 0.95), "AP50" and "AP75".

    Images are taken one after the other, and only run lengths of their masks are kept.

    Args:
      truth: an entry an image.
      found: of the same images, in the same order.
      kind: whether boxes or masks are compared.

    Returns:
      Numbers in [0, 1]; 0 where nothing was found.

    Raises:
      ValueError: there is no true object, or an image has no entry.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    sizes, entries = _collect(truth, kind)
    looked_at, results = _collect(found, kind)
    if len(sizes) != len(looked_at):
        raise ValueError(
            f"{len(sizes)} images have annotations, but {len(looked_at)} have predictions"
        )
    if not entries:
        raise ValueError("average precision is undefined: no image has a true object")
    if not results:
        return dict.fromkeys(_PLACES, 0.0)
    # Classes without a true object have no precision, and are left out of the mean.
    classes = sorted({entry["category_id"] for entry in entries})
    # pycocotools reports its progress with print.
    with redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {
            "info": {},
            "images": [
                {"id": image + 1, "height": height, "width": width}
                for image, (height, width) in enumerate(sizes)
            ],
            "categories": [{"id": number} for number in classes],
            # From 1: pycocotools takes a match with annotation 0 for no match.
            "annotations": [{**entry, "id": at} for at, entry in enumerate(entries, start=1)],
        }
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # pycocotools writes -1 where it has nothing to average.
    return {name: max(float(evaluation.stats[place]), 0.0) for name, place in _PLACES.items()}


def paste(
    probabilities: NDArray[Any], boxes: NDArray[Any], size: tuple[int, int], *, stride: int = 1
) -> NDArray[np.bool_]:
    """Masks over the whole image from probabilities inside of boxes: where one half is exceeded.

    Each is scaled to its box, bilinear, rounded outwards to whole pixels, and cut off at the
    image's border.

    Args:
      probabilities: (n, side, side).
      boxes: (n, 4).
      size: (height, width) of the image.
      stride: pixels of the image between two of a mask; what is in their middle counts.

    Returns:
      (n, height / stride, width / stride).
    """
    masks = np.zeros((len(boxes), *(side // stride for side in size)), bool)
    whole = np.zeros(size, bool)
    middles = slice(stride // 2, None, stride)
    for mask, drawn, (left, top, right, bottom) in zip(masks, probabilities, boxes, strict=True):
        x, y = math.floor(left), math.floor(top)
        wide, high = max(math.ceil(right) - x, 1), max(math.ceil(bottom) - y, 1)
        scaled = Image.fromarray(np.asarray(drawn, np.float32)).resize(
            (wide, high), Image.Resampling.BILINEAR
        )
        # `max` twice: a negative stop would count from the other end of the image.
        rows, columns = slice(max(y, 0), max(y + high, 0)), slice(max(x, 0), max(x + wide, 0))
        whole[...] = False
        part = whole[rows, columns]
        top, left = max(-y, 0), max(-x, 0)
        part[...] = np.asarray(scaled)[top:, left:][: part.shape[0], : part.shape[1]] > 0.5
        mask[...] = whole[middles, middles]
    return masks


def _collect(
    images: Iterable[Annotated], kind: Kind
) -> tuple[list[tuple[int, int]], list[dict[str, Any]]]:
    """Sizes of images, and COCO's annotations of all of them."""
    sizes, entries = [], []
    for image, one in enumerate(images):
        sizes.append(one.size)
        entries += _entries(image, one, kind)
    return sizes, entries


def _entries(image: int, one: Annotated, kind: Kind) -> list[dict[str, Any]]:
    """COCO's annotations of an image: boxes as left, top, width, height."""
    from pycocotools import mask as run_lengths

    entries = []
    for index, (box, number) in enumerate(zip(one.boxes, one.classes, strict=True)):
        left, top, right, bottom = (float(side) for side in box)
        entry: dict[str, Any] = {
            "image_id": image + 1,
            "category_id": int(number),
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "iscrowd": 0 if one.is_crowd is None else int(one.is_crowd[index]),
        }
        if one.scores is not None:
            entry["score"] = float(one.scores[index])
        if kind == "segm":
            if one.masks is None:
                raise ValueError("masks cannot be compared: an image has only boxes")
            entry["segmentation"] = run_lengths.encode(
                np.asfortranarray(one.masks[index].astype(np.uint8))
            )
            entry["area"] = float(one.masks[index].sum())
        if one.scores is not None and kind == "segm":
            # With a box pycocotools would take the box's outline for the mask.
            del entry["bbox"]
        entries.append(entry)
    return entries
