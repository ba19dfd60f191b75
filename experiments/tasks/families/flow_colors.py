"""Optical flow in the colors of the Middlebury wheel: hue is direction, saturation is length.

Source: Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011; the
lengths of the wheel's six segments are those of the authors' released program.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from experiments.data.images import Pixels

# From one corner of the color cube to the next: (steps, from, to).
_RED, _YELLOW, _GREEN = (255, 0, 0), (255, 255, 0), (0, 255, 0)
_CYAN, _BLUE, _MAGENTA = (0, 255, 255), (0, 0, 255), (255, 0, 255)
_SEGMENTS = (
    (15, _RED, _YELLOW),
    (6, _YELLOW, _GREEN),
    (4, _GREEN, _CYAN),
    (11, _CYAN, _BLUE),
    (13, _BLUE, _MAGENTA),
    (6, _MAGENTA, _RED),
)
# What is longer than the longest is shown darker.
_DIMMED = 0.75


@lru_cache(maxsize=1)
def color_wheel() -> NDArray[np.float64]:
    """The colors by direction, (55, 3) in [0, 1], from rightwards on over downwards."""
    parts = []
    for steps, begin, end in _SEGMENTS:
        share = np.arange(steps)[:, None] / steps
        parts.append((1 - share) * np.array(begin) + share * np.array(end))
    return np.concatenate(parts) / 255


def flow_to_colors(flow: NDArray[np.floating], longest: float) -> Pixels:
    """Draws a flow field.

    Args:
      flow: (..., 2), x to the right and y down. No flow is white.
      longest: length that gets the full color; the same for pictures to be compared.

    Returns:
      (..., 3).

    Raises:
      ValueError: `longest` is not positive.
    """
    if not longest > 0:
        raise ValueError(f"longest must be positive, got {longest}")
    x, y = np.moveaxis(np.asarray(flow, float) / longest, -1, 0)
    length = np.hypot(x, y)[..., None]
    wheel = color_wheel()
    # `% 1` rounds a tiny negative angle up to 1, hence the other `%` below.
    turn = np.arctan2(y, x) / (2 * np.pi) % 1 * len(wheel)
    low = np.floor(turn).astype(int) % len(wheel)
    share = (turn - np.floor(turn))[..., None]
    color = (1 - share) * wheel[low] + share * wheel[(low + 1) % len(wheel)]
    shown = np.where(length <= 1, 1 - length * (1 - color), _DIMMED * color)
    return np.floor(255 * shown).astype(np.uint8)
