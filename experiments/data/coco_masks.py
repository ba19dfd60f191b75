"""COCO's masks, from its own annotation files beside the data sets of tensorflow-datasets.

tensorflow-datasets keeps the numbers of images and objects, but no outlines. These are in
`instances_train2017.json` and `instances_val2017.json` of annotations_trainval2017.zip, looked for
in `DATA_DIR/coco/annotations`. A file is read once, by pycocotools; of each object only compressed
run lengths are kept, since the lists of all polygons of the training split take gigabytes.

Source: Lin et al., "Microsoft COCO", ECCV 2014; cocodataset.org, "Data format".
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO

from experiments.data.records import MissingDatasetError, data_folder

# Pixels of the scaled image between two of a mask. 100 masks of 1,024 x 1,024 pixels take 105 MB.
STRIDE = 4
_FILES = {"train": "instances_train2017.json", "validation": "instances_val2017.json"}


class Outline(NamedTuple):
    """The mask of one object.

    Attributes:
      image: number of its image.
      size: (height, width) of the image.
      counts: run lengths as pycocotools compresses them.
    """

    image: int
    size: tuple[int, int]
    counts: bytes

    def decode(self) -> NDArray[np.uint8]:
        """Returns (height, width), 1 where the object is seen."""
        pixels: NDArray[np.uint8] = run_lengths.decode(self._run_lengths())
        return pixels

    def is_empty(self) -> bool:
        """Whether no pixel of the image shows the object."""
        return not run_lengths.area(self._run_lengths())

    def _run_lengths(self) -> dict[str, Any]:
        return {"size": list(self.size), "counts": self.counts}


@dataclass(frozen=True)
class CocoMasks:
    """The masks of one split.

    Attributes:
      file: that they were read from.
      outlines: by the number of the object.
    """

    file: Path
    outlines: dict[int, Outline]

    def find(self, image: int, objects: Sequence[int], name: str) -> list[Outline]:
        """Returns the outlines of an image's objects.

        Args:
          image: its number.
          objects: their numbers.
          name: of the image, for messages.

        Raises:
          ValueError: the file does not know an object, or knows it in another image.
        """
        for number in objects:
            outline = self.outlines.get(number)
            if outline is None or outline.image != image:
                raise ValueError(
                    f"{name}: {self.file} has no annotation {number} of image {image}. Both must "
                    "be the same split of COCO 2017"
                )
        return [self.outlines[number] for number in objects]


def open_masks(split: str, data_dir: str | Path | None = None) -> CocoMasks:
    """Reads the masks of a split, "train" or "validation".

    An object without a segmentation, or with one outside of the image, has an empty mask.

    Raises:
      MissingDatasetError: the file is not there; says what to get and where to put it.
      ValueError: it is not a file of annotations, or a segmentation is neither polygons nor run
        lengths of its image; the message names file and annotation.
    """
    file = data_folder(data_dir) / "coco" / "annotations" / _FILES[split]
    if not file.is_file():
        raise MissingDatasetError(
            f"there is no {file}, and tensorflow-datasets has no masks of COCO. Download "
            "annotations_trainval2017.zip of cocodataset.org and unpack it in "
            f"{file.parent.parent}, or train --model faster_rcnn, which only needs boxes."
        )
    try:
        # pycocotools reports its progress with print.
        with redirect_stdout(io.StringIO()):
            index = COCO(file)
    except Exception as error:  # AssertionError, KeyError, TypeError, JSON's errors, ...
        raise ValueError(f"{file} is not an annotation file: {_describe(error)}") from error
    sizes = {number: (image["height"], image["width"]) for number, image in index.imgs.items()}
    outlines = {}
    for number, annotation in index.anns.items():
        try:
            image = annotation["image_id"]
            counts = _compress(annotation["segmentation"], *sizes[image])
        except Exception as error:  # pycocotools raises plain Exceptions too.
            raise ValueError(
                f"{file}: annotation {number} has no readable segmentation: {_describe(error)}"
            ) from error
        outlines[number] = Outline(image, sizes[image], counts)
    return CocoMasks(file, outlines)


def sample_masks(
    outlines: Sequence[Outline], scaled: tuple[int, int], side: int, *, mirrored: bool = False
) -> NDArray[np.uint8]:
    """Masks of a scaled image, padded to a square, at a quarter of its resolution.

    A pixel of a mask is what the original shows in the middle of `STRIDE` x `STRIDE` pixels of the
    scaled image. What is slimmer than that may be lost.

    Args:
      outlines: n objects of one image.
      scaled: (height, width) that the image is scaled to.
      side: of the masks.
      mirrored: whether left and right are swapped.

    Returns:
      (n, side, side) uint8, 1 where an object is seen.
    """
    height, width = scaled
    middles = STRIDE * (np.arange(side) + 0.5)
    rows, columns = middles[middles < height], middles[middles < width]
    if mirrored:
        columns = width - columns
    masks = np.zeros((len(outlines), side, side), np.uint8)
    for mask, outline in zip(masks, outlines, strict=True):
        # Positions are continuous: without its fraction, one names the pixel that it lies in.
        down = (rows * outline.size[0] / height).astype(int)
        across = (columns * outline.size[1] / width).astype(int)
        mask[: len(rows), : len(columns)] = outline.decode()[down[:, None], across]
    return masks


def _compress(segmentation: Any, height: int, width: int) -> bytes:
    """Run lengths of polygons, of run lengths in a list, or of nothing."""
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"its size {segmentation['size']} is not {[height, width]}")
        if sum(segmentation["counts"]) != height * width:
            raise ValueError(f"its run lengths do not add up to {height} x {width} pixels")
        found = run_lengths.frPyObjects(segmentation, height, width)
    elif segmentation:
        # An object in several visible parts has several polygons.
        found = run_lengths.merge(run_lengths.frPyObjects(segmentation, height, width))
    else:
        # pycocotools takes column-major arrays only.
        found = run_lengths.encode(np.zeros((height, width), np.uint8, order="F"))
    counts: bytes = found["counts"]
    return counts


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
