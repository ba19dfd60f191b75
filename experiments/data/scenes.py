"""Scenes to detect objects in: handwritten digits over photographs, with exact boxes and masks.

scikit-learn ships both. A digit is enlarged, tinted and put somewhere on a darkened photograph, as
chalk would look; later ones hide parts of earlier ones. Its mask is its visible part and its box
is that mask's. Training scenes are made of other digits and of other parts of the photographs than
test scenes.

Everything that is drawn is annotated. A digit that would hide too much of another is left out.
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
MOST_TRIES = 7  # to put one somewhere
SIDES = (22, 36)  # of an enlarged digit, in pixels
# Brightness that a photograph is darkened to, and the darkest tint of a digit in each channel.
DARKENED = 0.5
DARKEST_TINT = 0.7
# Fractions: of the digits, for training; of gray that is ink; of a digit that must be seen.
_TRAIN_SHARE = 0.7
_INK = 0.3
_SEEN = 0.75


class Scene(NamedTuple):
    """An image and what is in it.

    Attributes:
      image: (size, size, 3) float32 in [0, 1].
      boxes: (MOST_OBJECTS, 4) float32: left, top, right, bottom, in pixels.
      classes: (MOST_OBJECTS,) int32: the digit, 10 for a zero; 0 is padding.
      masks: (MOST_OBJECTS, size, size) uint8.
    """

    image: NDArray[np.float32]
    boxes: NDArray[np.float32]
    classes: NDArray[np.int32]
    masks: NDArray[np.uint8]


def draw_scene(rng: np.random.Generator, size: int, split: Split) -> Scene:
    """Draws a scene with none to `MOST_OBJECTS` digits.

    Args:
      rng: drawn from; the same generator gives the same scene.
      size: of the image's sides.
      split: which digits and which part of the photographs to use.
    """
    image = _background(rng, size, split)
    digits, labels = load_digits(split)
    masks: list[NDArray[np.bool_]] = []
    areas: list[int] = []
    classes: list[int] = []
    for _ in range(rng.integers(0, MOST_TRIES + 1)):
        if len(masks) == MOST_OBJECTS:
            break
        at = rng.integers(len(labels))
        ink = _place(rng, digits[at], size)
        seen = [mask & ~ink for mask in masks]
        # Compared with all of a digit's ink, so that what several digits hide adds up.
        if any(mask.sum() < _SEEN * area for mask, area in zip(seen, areas, strict=True)):
            continue
        image[ink] = rng.uniform(DARKEST_TINT, 1, 3)
        # Class 0 is the background.
        number = int(labels[at]) or 10
        masks, areas, classes = [*seen, ink], [*areas, ink.sum()], [*classes, number]
    return _annotated(image, classes, masks)


def box_of(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The smallest box around a mask (height, width) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@lru_cache(maxsize=2)
def load_digits(split: Split) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The digits of a split, (count, 8, 8) in [0, 1], and which they are."""
    from sklearn.datasets import load_digits as load

    data = load()
    # Not the run's seed: all runs have the same test digits.
    order = np.random.default_rng(0).permutation(len(data.target))
    border = round(_TRAIN_SHARE * len(order))
    chosen = order[:border] if split == "train" else order[border:]
    # scikit-learn's gray values run from 0 to 16.
    return data.images[chosen] / 16.0, data.target[chosen]


def _background(rng: np.random.Generator, size: int, split: Split) -> NDArray[np.float32]:
    textures = photographs(split)
    texture = textures[rng.integers(len(textures))]
    top = rng.integers(texture.shape[0] - size + 1)
    left = rng.integers(texture.shape[1] - size + 1)
    return np.array(DARKENED * texture[top : top + size, left : left + size], np.float32)


def _place(rng: np.random.Generator, digit: NDArray[np.float64], size: int) -> NDArray[np.bool_]:
    """The ink of an enlarged digit somewhere in the image."""
    side = int(rng.integers(SIDES[0], SIDES[1] + 1))
    gray = Image.fromarray(digit.astype(np.float32))
    ink = np.asarray(gray.resize((side, side), Image.Resampling.BICUBIC)) > _INK
    # Cut to its ink, so that a digit may touch the image's border.
    left, top, right, bottom = box_of(ink)
    ink = ink[top:bottom, left:right]
    mask = np.zeros((size, size), bool)
    row = rng.integers(size - ink.shape[0] + 1)
    column = rng.integers(size - ink.shape[1] + 1)
    mask[row : row + ink.shape[0], column : column + ink.shape[1]] = ink
    return mask


def _annotated(
    image: NDArray[np.float32], classes: list[int], masks: list[NDArray[np.bool_]]
) -> Scene:
    """Pads the annotation to its static shape."""
    scene = Scene(
        image=image,
        boxes=np.zeros((MOST_OBJECTS, 4), np.float32),
        classes=np.zeros(MOST_OBJECTS, np.int32),
        masks=np.zeros((MOST_OBJECTS, *image.shape[:2]), np.uint8),
    )
    for index, (number, mask) in enumerate(zip(classes, masks, strict=True)):
        scene.boxes[index], scene.classes[index], scene.masks[index] = box_of(mask), number, mask
    return scene
