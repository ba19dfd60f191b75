"""Optical flow and images on disk: Middlebury's `.flo`, and `.ppm` or `.png` through Pillow.

A `.flo` file is the float 202021.25 (its bytes spell "PIEH"), width and height as int32, then u
and v of every pixel, row by row, as float32; all little-endian. Unknown flow is larger than 1e9.

Source: Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011, and
the reader on vision.middlebury.edu/flow.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.data.images import Pixels, decode_image

Flow = NDArray[np.float32]

UNKNOWN_FLOW = 1e9

_MAGIC = b"PIEH"
_HEADER_BYTES = 12
# Larger than any camera's. A broken header could ask for more memory than the machine has.
_LONGEST_SIDE = 100_000


def read_flo(path: Path) -> Flow:
    """Reads a `.flo` file.

    Returns:
      (height, width, 2) float32, u to the right and v down, in pixels.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a whole `.flo` file; the message names it and says what is wrong.
    """
    data = path.read_bytes()
    if data[:4] != _MAGIC:
        raise ValueError(f"{path} is not a .flo file: it begins with {data[:4]!r}, not {_MAGIC!r}")
    if len(data) < _HEADER_BYTES:
        raise ValueError(f"{path} ends within its header, after {len(data)} bytes")
    width, height = (int(side) for side in np.frombuffer(data, "<i4", 2, offset=4))
    if not (0 < width <= _LONGEST_SIDE and 0 < height <= _LONGEST_SIDE):
        raise ValueError(f"{path} has a broken header: {width} x {height} pixels")
    # Two float32 a pixel.
    expected = _HEADER_BYTES + 8 * width * height
    if len(data) != expected:
        raise ValueError(
            f"{path} is damaged: {width} x {height} pixels make {expected} bytes, got {len(data)}"
        )
    flow = np.frombuffer(data, "<f4", offset=_HEADER_BYTES).reshape(height, width, 2)
    # A copy in the machine's byte order: `frombuffer` only gives a view that cannot be written.
    return flow.astype(np.float32)


def write_flo(path: Path, flow: NDArray[np.floating]) -> None:
    """Writes a `.flo` file. `read_flo` returns the same bits if the flow was float32.

    Args:
      path: of the file.
      flow: (height, width, 2).

    Raises:
      ValueError: the array has another shape.
    """
    if flow.ndim != 3 or flow.shape[2] != 2 or 0 in flow.shape:
        raise ValueError(f"flow must be (height, width, 2), got {flow.shape}")
    height, width, _ = flow.shape
    header = _MAGIC + np.array([width, height], "<i4").tobytes()
    path.write_bytes(header + flow.astype("<f4").tobytes())


def is_known(flow: Flow) -> NDArray[np.bool_]:
    """Where the flow is known, (height, width): both components finite and at most 1e9."""
    # NaN compares as False.
    return np.asarray((np.abs(flow) <= UNKNOWN_FLOW).all(axis=-1))


def read_image(path: Path) -> Pixels:
    """Reads an image, (height, width, 3) uint8.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a readable image; the message names it.
    """
    try:
        return np.asarray(decode_image(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
