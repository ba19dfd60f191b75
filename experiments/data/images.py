"""Image augmentation, in NumPy and Pillow.

Images are uint8 arrays (height, width, channels) until `normalize`, which returns float32. A
function that is random takes a NumPy generator and draws from nothing else, so the same
generator gives the same image.
"""

from __future__ import annotations

import io
import math
from base64 import b64encode
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Principal components of the RGB values of ImageNet's training images, scaled to [0, 1]: the
# columns of `_PCA_VECTORS`, with the square roots of their variances. Krizhevsky et al., 2012.
_PCA_SCALES = np.array([0.2175, 0.0188, 0.0045])
_PCA_VECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


class Box(NamedTuple):
    """A rectangle of pixels: rows top .. top + height, columns left .. left + width."""

    top: int
    left: int
    height: int
    width: int


def decode_image(encoded: bytes) -> Image.Image:
    """Decodes a JPEG or PNG file to RGB.

    Raises:
      ValueError: if it is not a readable image.
    """
    try:
        # `convert` reads the pixels too, so a truncated file is found here.
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
        kind = type(error).__name__
        raise ValueError(f"{len(encoded)} bytes that are not a readable image ({kind})") from error


def image_uri(pixels: Pixels) -> str:
    """The image as a JPEG in a data URI, which an HTML page shows without another file."""
    file = io.BytesIO()
    # `subsampling=0` keeps colors at full resolution, which drawn edges need.
    Image.fromarray(pixels).save(file, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"


def random_crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draws a rectangle of random area and aspect ratio inside an image.

    The share of the image's area is uniform in `area`, the width over height log-uniform in
    `ratio`. If ten draws do not fit, the largest central rectangle with an allowed ratio.

    Args:
      rng: source of the draws.
      height: of the image.
      width: of the image.
      area: smallest and largest share of the image's area.
      ratio: smallest and largest width over height.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    # Ten tries, then the center: torchvision's rule.
    for _ in range(10):
        pixels = rng.uniform(*area) * height * width
        aspect = math.exp(rng.uniform(low, high))
        h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return Box(int(top), int(left), h, w)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return center_box(height, width, h, w)


def center_box(height: int, width: int, crop_height: int, crop_width: int) -> Box:
    """Returns the central rectangle of a given size."""
    top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
    return Box(top, left, crop_height, crop_width)


def crop_and_resize(image: Image.Image, box: Box, size: int) -> Pixels:
    """Cuts out a rectangle and scales it to (size, size, 3), bilinear with antialiasing."""
    # Cropped first: `resize(box=...)` would mix in pixels from outside the rectangle.
    cut = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR))


def resize_and_center_crop(image: Image.Image, shorter: int, size: int) -> Pixels:
    """Scales the shorter side to `shorter` and cuts out the central (size, size, 3)."""
    scale = shorter / min(image.size)
    # Rounded down like torchvision. `max`, because 256 / 49 * 49 is a little less than 256.
    width, height = (max(shorter, int(side * scale)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    box = center_box(height, width, size, size)
    return np.asarray(resized)[box.top : box.top + size, box.left : box.left + size]


def random_shift(rng: np.random.Generator, image: Pixels, padding: int) -> Pixels:
    """Pads with zeros all around and cuts out a random window of the original size."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = rng.integers(2 * padding + 1, size=2)
    return padded[top : top + height, left : left + width]


def random_flip(rng: np.random.Generator, image: Pixels) -> Pixels:
    """Mirrors left and right, every other time."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def lighting_shift(rng: np.random.Generator, std: float) -> Floats:
    """Draws the color shift of "PCA lighting": sum_i alpha_i s_i v_i, alpha_i ~ normal(0, std).

    Args:
      rng: source of the draws.
      std: of the alphas; 0.1 in the recipes.

    Returns:
      (3,), to be added to RGB values in [0, 1].
    """
    alphas = rng.normal(0.0, std, size=3)
    return (_PCA_VECTORS @ (alphas * _PCA_SCALES)).astype(np.float32)


def normalize(
    image: Pixels,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    shift: Floats | float = 0.0,
) -> Floats:
    """Returns (image / 255 + shift - mean) / std as float32.

    Args:
      image: (height, width, channels), uint8.
      mean: of each channel, in [0, 1].
      std: of each channel, in [0, 1].
      shift: added to each channel, as drawn by `lighting_shift`.
    """
    mean_, std_ = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    # One multiplication and one addition a pixel: this runs on the host for every image.
    scale = (1 / (255 * std_)).astype(np.float32)
    return image * scale + ((shift - mean_) / std_).astype(np.float32)
