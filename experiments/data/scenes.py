"""Scenes to detect objects in: handwritten digits over photographs, with exact boxes and masks.

scikit-learn ships both. A digit is enlarged, coloured and put somewhere; later ones hide parts of
earlier ones. Its mask is what is seen of it and its box is that mask's. Training scenes are made
of other digits and of other parts of the photographs than test scenes.

A digit of which too little is left to be seen is taken out of the scene's annotation, as an
annotator would; `Scene.hidden` counts them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from experiments.data.synthetic_flow import Split, photographs

CLASSES = 11  # the background and ten digits
MOST_OBJECTS = 4
SIDES = (18, 34)  # of an enlarged digit, in pixels
# Fractions: of the digits, for training; of grey that is ink; of a mask that must be seen.
_TRAIN_SHARE = 0.7
_INK = 0.3
_SEEN = 0.4


class Scene(NamedTuple):
    """An image and what is in it.

    Attributes:
      image: (size, size, 3) float32 in [0, 1].
      boxes: (MOST_OBJECTS, 4) float32: left, top, right, bottom, in pixels.
      classes: (MOST_OBJECTS,) int32: the digit + 1; 0 is padding.
      masks: (MOST_OBJECTS, size, size) uint8.
      hidden: digits that are not annotated, because too little of them is seen.
    """

    image: NDArray[np.float32]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int32]
    masks: NDArray[np.uint8]
    hidden: int


def draw_scene(rng: np.random.Generator, size: int, split: Split) -> Scene:
    """Draws a scene with none to `MOST_OBJECTS` digits.

    Args:
      rng: drawn from; the same generator gives the same scene.
      size: of the image's sides.
      split: which digits and which part of the photographs to use.
    """
    image = _background(rng, size, split)
    digits, labels = load_digits(split)
    count = int(rng.integers(0, MOST_OBJECTS + 1))
    masks = np.zeros((count, size, size), bool)
    whole = np.zeros(count, int)
    classes = np.zeros(count, np.int32)
    for index in range(count):
        at = int(rng.integers(len(labels)))
        mask = _place(rng, digits[at], size)
        image[mask] = _ink(rng, image[mask].mean(axis=0))
        masks[:index] &= ~mask
        masks[index], whole[index], classes[index] = mask, mask.sum(), labels[at] + 1
    seen = masks.sum(axis=(1, 2)) > _SEEN * whole
    return _annotated(image, classes[seen], masks[seen], int((~seen).sum()))


def box_of(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The smallest box around a mask (height, width) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@lru_cache(maxsize=2)
def load_digits(split: Split) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The digits of a split, (count, 8, 8) in [0, 1], and which they are."""
    from sklearn.datasets import load_digits as load

    data = load()
    order = np.random.default_rng(0).permutation(len(data.target))
    border = round(_TRAIN_SHARE * len(order))
    chosen = order[:border] if split == "train" else order[border:]
    return data.images[chosen] / 16.0, data.target[chosen]


def _background(rng: np.random.Generator, size: int, split: Split) -> NDArray[np.float32]:
    textures = photographs(split)
    texture = textures[rng.integers(len(textures))]
    top = rng.integers(texture.shape[0] - size + 1)
    left = rng.integers(texture.shape[1] - size + 1)
    return np.array(texture[top : top + size, left : left + size], np.float32)


def _place(rng: np.random.Generator, digit: NDArray[np.float64], size: int) -> NDArray[np.bool_]:
    """The ink of an enlarged digit somewhere in the image."""
    side = int(rng.integers(SIDES[0], SIDES[1] + 1))
    grey = Image.fromarray(digit.astype(np.float32))
    ink = np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC)) > _INK
    # Cut to its ink, so that a digit may touch the image's border.
    left, top, right, bottom = box_of(ink)
    ink = ink[top:bottom, left:right]
    mask = np.zeros((size, size), bool)
    row = rng.integers(size - ink.shape[0] + 1)
    column = rng.integers(size - ink.shape[1] + 1)
    mask[row : row + ink.shape[0], column : column + ink.shape[1]] = ink
    return mask


def _ink(rng: np.random.Generator, below: NDArray[np.float32]) -> NDArray[np.float32]:
    """A colour that can be told from what it covers."""
    while True:
        colour = rng.uniform(0, 1, 3)
        if np.abs(colour - below).max() > 0.35:
            return colour.astype(np.float32)


def _annotated(
    image: NDArray[np.float32],
    classes: NDArray[np.int32],
    masks: NDArray[np.bool_],
    hidden: int,
) -> Scene:
    """Pads the annotation to its static shape."""
    missing = MOST_OBJECTS - len(classes)
    boxes = np.zeros((MOST_OBJECTS, 4), np.float32)
    for index, mask in enumerate(masks):
        boxes[index] = box_of(mask)
    return Scene(
        image=image,
        boxes=boxes,
        classes=np.pad(classes, (0, missing)),
        masks=np.pad(masks, ((0, missing), (0, 0), (0, 0))).astype(np.uint8),
        hidden=hidden,
    )
