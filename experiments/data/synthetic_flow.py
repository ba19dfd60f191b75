"""Pairs of images with exact dense flow: photographs that move in layers.

scikit-learn ships two photographs; they are given colored grain, in parts stronger than what they
show. A background and a few blobs are cut out of them at random and each moves by an affine map of
its own, the blobs in front of the background and of each other.
The flow is exact: texture and outline of a layer are functions of the position in the first image,
and the second image evaluates them at the position that the inverse map takes a pixel from. Pixels
that are hidden in the second image have a true flow too, as in FlyingChairs.

Training images are cut out of the left of the photographs, test images out of the right.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

Split = Literal["train", "test"]
Array = NDArray[np.float64]

# Scaled down, so that a cut of 64 pixels holds more than one leaf.
SHRINK = 2
# Standard deviation of the grain, each channel's own, in values from 0 to 1, and its width in
# pixels. Sky and what is out of focus have no texture of their own, so that nothing could be told
# about their motion. Grain much finer than a pixel of the network's maps would look like another
# one after half of it.
GRAIN = 0.2
GRAIN_WIDTH = 3.0
# The part of the photographs' width that training images come from.
TRAIN_SHARE = 0.65
# The largest number of blobs, and standard deviations of a layer's motion.
BLOBS = 2
SHIFT_PIXELS = 4.0
TURN = 0.06  # radians
STRETCH = 0.04


class Layer(NamedTuple):
    """Something that moves as one piece.

    Attributes:
      texture: (height, width, 3), gray values in [0, 1].
      origin: (2,), where in the texture the image's center lies, x and y.
      turn: (2, 2), from positions in the image, against its center, to the texture's.
      motion: (2, 3), affine: from positions in the first image to those in the second, both
        against the image's center.
      center: (2,), of the outline, against the image's center.
      radii: amplitudes and phases of the outline's radius as a function of the angle, (waves, 2);
        empty for a background, which has no outline.
    """

    texture: Array
    origin: Array
    turn: Array
    motion: Array
    center: Array
    radii: Array


class FlowPair(NamedTuple):
    """An example.

    Attributes:
      first: (size, size, 3) float32 in [0, 1].
      second: of the same shape.
      flow: (size, size, 2) float32, x and y in pixels, from the first to the second.
    """

    first: NDArray[np.float32]
    second: NDArray[np.float32]
    flow: NDArray[np.float32]


def draw_pair(rng: np.random.Generator, size: int, split: Split) -> FlowPair:
    """Draws a pair of images and the flow between them.

    Args:
      rng: drawn from; the same generator gives the same pair.
      size: of the images' sides.
      split: which part of the photographs to cut from.
    """
    return render(draw_layers(rng, size, split), size)


def draw_layers(rng: np.random.Generator, size: int, split: Split) -> list[Layer]:
    """Draws a background and one to `BLOBS` blobs, from back to front."""
    blobs = int(rng.integers(1, BLOBS + 1))
    return [_draw_layer(rng, size, split, is_blob=index > 0) for index in range(blobs + 1)]


def render(layers: list[Layer], size: int) -> FlowPair:
    """Draws both images, and the flow of the layer that is seen in the first.

    Args:
      layers: from back to front; the first has no outline.
      size: of the images' sides.
    """
    middle = (size - 1) / 2
    y, x = np.mgrid[:size, :size] - middle
    points = np.stack([x, y], axis=-1)
    first, second = np.zeros((2, size, size, 3))
    flow = np.zeros((size, size, 2))
    for layer in layers:
        seen = _covers(layer, points)
        first[seen] = _texture_at(layer, points[seen])
        flow[seen] = move(layer.motion, points[seen]) - points[seen]
        # Backwards, so that every pixel of the second image gets a value.
        source = move(_inverse(layer.motion), points)
        seen = _covers(layer, source)
        second[seen] = _texture_at(layer, source[seen])
    return FlowPair(*(image.astype(np.float32) for image in (first, second, flow)))


def move(motion: Array, points: Array) -> Array:
    """Applies an affine map (2, 3) to points (..., 2)."""
    return points @ motion[:, :2].T + motion[:, 2]


@lru_cache(maxsize=2)
def photographs(split: Split) -> tuple[Array, ...]:
    """The part of scikit-learn's two photographs that belongs to a split, in [0, 1].

    Each is (height, width, 3), scaled down by `SHRINK`.
    """
    from sklearn.datasets import load_sample_images

    parts = []
    for pixels in load_sample_images().images:
        height, width = (side // SHRINK for side in pixels.shape[:2])
        small = Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)
        border = round(TRAIN_SHARE * width)
        chosen = slice(None, border) if split == "train" else slice(border, None)
        parts.append(np.asarray(small)[:, chosen] / 255.0)
    return tuple(parts)


@lru_cache(maxsize=2)
def grained(split: Split) -> tuple[Array, ...]:
    """The photographs of a split, with grain that moves with them; the result is cached."""
    rng = np.random.default_rng(0)
    found = []
    for texture in photographs(split):
        grain = gaussian_filter(rng.standard_normal(texture.shape), GRAIN_WIDTH, axes=(0, 1))
        found.append(np.clip(texture + GRAIN / grain.std() * grain, 0, 1))
    return tuple(found)


def _draw_layer(rng: np.random.Generator, size: int, split: Split, *, is_blob: bool) -> Layer:
    textures = grained(split)
    texture = textures[rng.integers(len(textures))]
    height, width, _ = texture.shape
    radii = np.zeros((0, 2))
    center = np.zeros(2)
    if is_blob:
        center = rng.uniform(-0.4, 0.4, 2) * size
        mean = rng.uniform(0.12, 0.28) * size
        # Three waves of at most a fifth of the mean each: the radius stays positive.
        amplitudes = mean * np.array([1.0, *rng.uniform(0, 0.2, 3)])
        radii = np.stack([amplitudes, rng.uniform(0, 2 * np.pi, 4)], axis=-1)
    linear = _rotation(rng.normal(0, TURN)) @ np.diag(1 + rng.normal(0, STRETCH, 2))
    # Turns and stretches about the layer's own center, then moves on.
    shift = center - linear @ center + rng.normal(0, SHIFT_PIXELS, 2)
    return Layer(
        texture=texture,
        origin=rng.uniform(0, 1, 2) * (width - 1, height - 1),
        turn=_rotation(rng.uniform(0, 2 * np.pi)) * rng.uniform(0.8, 1.25),
        motion=np.column_stack([linear, shift]),
        center=center,
        radii=radii,
    )


def _covers(layer: Layer, points: Array) -> NDArray[np.bool_]:
    """Whether points of the first image, (..., 2), lie inside the outline."""
    if len(layer.radii) == 0:
        return np.ones(points.shape[:-1], bool)
    x, y = np.moveaxis(points - layer.center, -1, 0)
    angle = np.arctan2(y, x)
    radius = layer.radii[0, 0] + sum(
        amplitude * np.cos(wave * angle + phase)
        # From two waves around on: a single one would do little but shift the outline.
        for wave, (amplitude, phase) in enumerate(layer.radii[1:], start=2)
    )
    return np.asarray(np.hypot(x, y) <= radius)


def _texture_at(layer: Layer, points: Array) -> Array:
    """Gray values at points of the first image, bilinear; the photograph is mirrored outside."""
    x, y = np.moveaxis(points @ layer.turn.T + layer.origin, -1, 0)
    channels = [
        map_coordinates(layer.texture[..., channel], [y, x], order=1, mode="mirror")
        for channel in range(3)
    ]
    return np.stack(channels, axis=-1)


def _rotation(angle: float) -> Array:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _inverse(motion: Array) -> Array:
    linear = np.linalg.inv(motion[:, :2])
    return np.column_stack([linear, -linear @ motion[:, 2]])
