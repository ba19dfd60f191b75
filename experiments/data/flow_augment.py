"""Augmentation of a pair of images and its flow: scaled, mirrored, cut out.

The ranges are RAFT's for FlyingChairs. Its changes of color and its erased rectangles are left
out. A function that is random takes a NumPy generator and draws from nothing else.

Source: Teed and Deng, "RAFT", ECCV 2020; princeton-vl/RAFT.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from experiments.data.flow_files import Flow
from experiments.data.images import Pixels

# Scales are powers of two of these; the two axes differ by up to the stretch, each with a chance.
SCALE = (-0.1, 1.0)
STRETCH = 0.2
SCALED, STRETCHED = 0.8, 0.8
MIRRORED, TURNED_OVER = 0.5, 0.1

Pair = tuple[Pixels, Pixels, Flow]


def augment(rng: np.random.Generator, pair: Pair, height: int, width: int) -> Pair:
    """Scales, mirrors and cuts out `height` x `width` pixels.

    Raises:
      ValueError: the images are smaller than what is cut out.
    """
    rows, columns, _ = pair[0].shape
    if rows < height or columns < width:
        raise ValueError(f"cannot cut {height} x {width} pixels out of {rows} x {columns}")
    # One draw for both axes; the stretch then makes them differ.
    across = down = 2 ** rng.uniform(*SCALE) if rng.random() < SCALED else 1.0
    if rng.random() < STRETCHED:
        across *= 2 ** rng.uniform(-STRETCH, STRETCH)
        down *= 2 ** rng.uniform(-STRETCH, STRETCH)
    # Never smaller than the crop, whichever scale was drawn.
    pair = resize(pair, max(height, round(rows * down)), max(width, round(columns * across)))
    if rng.random() < MIRRORED:
        pair = mirror(pair)
    if rng.random() < TURNED_OVER:
        pair = turn_over(pair)
    top = rng.integers(pair[0].shape[0] - height + 1)
    left = rng.integers(pair[0].shape[1] - width + 1)
    return cut(pair, (slice(top, top + height), slice(left, left + width)))


def cut(pair: Pair, part: tuple[slice, slice]) -> Pair:
    """The same rows and columns of all three."""
    first, second, flow = pair
    return first[part], second[part], flow[part]


def resize(pair: Pair, height: int, width: int) -> Pair:
    """Scales images and flow field, bilinear, and the flow's lengths with them."""
    first, second, flow = pair
    rows, columns, _ = first.shape
    if (rows, columns) == (height, width):
        return pair
    size = (width, height)
    images = [
        np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        for image in (first, second)
    ]
    parts = [
        # Pillow scales floats only as images of one channel. A wider image also has longer flow.
        np.asarray(Image.fromarray(flow[..., i]).resize(size, Image.Resampling.BILINEAR)) * factor
        for i, factor in enumerate((width / columns, height / rows))
    ]
    return images[0], images[1], np.stack(parts, axis=-1).astype(np.float32)


def mirror(pair: Pair) -> Pair:
    """Swaps left and right; the flow's x changes its sign."""
    first, second, flow = cut(pair, (slice(None), slice(None, None, -1)))
    return first, second, flow * np.array([-1, 1], np.float32)


def turn_over(pair: Pair) -> Pair:
    """Swaps top and bottom; the flow's y changes its sign."""
    first, second, flow = cut(pair, (slice(None, None, -1), slice(None)))
    return first, second, flow * np.array([1, -1], np.float32)
