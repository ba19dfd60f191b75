"""All-pairs correlation of two feature maps, its pyramid, and the lookup of windows in it.

The lookup samples bilinearly, and all samples of a window lie whole pixels apart. So it is two
small matrix products a pixel with hat functions as weights, max(0, 1 - |k - y|), instead of a
gather: its gradient needs no scatter either.

Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020,
section 3.2.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


def center_and_scale(maps: jax.Array) -> jax.Array:
    """Subtracts each map's mean over its pixels, and gives every pixel the same length.

    Args:
      maps: (batch, rows, columns, features).

    Returns:
      The same shape; the squares of a pixel's features sum to their number.
    """
    maps = maps - maps.mean(axis=(1, 2), keepdims=True)
    mean_square = jnp.square(maps).mean(axis=-1, keepdims=True)
    # A pixel that is just the mean stays zero.
    return maps * jax.lax.rsqrt(mean_square + 1e-6)


def correlation_pyramid(first: jax.Array, second: jax.Array, levels: int) -> list[jax.Array]:
    """Correlates every pixel of one map with every pixel of another, at several resolutions.

    C[i, j, k, l] = <first[i, j], second[k, l]> / sqrt(features); each level after the first is
    the mean over 2x2 of the one before along k and l, odd last rows and columns left out.

    Args:
      first: (batch, rows, columns, features).
      second: of the same shape.
      levels: how many.

    Returns:
      Arrays (batch, rows, columns, rows / 2^level, columns / 2^level).

    Raises:
      ValueError: the maps differ in shape, or are too small for that many levels.
    """
    if first.shape != second.shape:
        raise ValueError(f"the maps differ in shape: {first.shape} and {second.shape}")
    batch, rows, columns, features = first.shape
    if min(rows, columns) >> (levels - 1) == 0:
        raise ValueError(
            f"{levels} levels need maps of at least {2 ** (levels - 1)} pixels a side, got {rows} "
            f"x {columns}: give larger images or fewer levels"
        )
    # The division is the released code's; section 3.2 lacks it.
    level = jnp.einsum("bijc,bklc->bijkl", first, second) / jnp.sqrt(features).astype(first.dtype)
    pyramid = [level]
    for _ in range(levels - 1):
        # `avg_pool` wants (batch, rows, columns, channels): each pixel of the first map becomes an
        # image.
        flat = level.reshape(batch * rows * columns, *level.shape[3:], 1)
        pooled = nn.avg_pool(flat, (2, 2), strides=(2, 2))
        level = pooled.reshape(batch, rows, columns, *pooled.shape[1:3])
        pyramid.append(level)
    return pyramid


def look_up(pyramid: list[jax.Array], points: jax.Array, radius: int) -> jax.Array:
    """Samples a window around a point in every level, bilinearly, zero outside.

    At level l the window's center is point / 2^l, as in the released code, although the center
    of the pooled pixels lies up to half a pixel off.

    Args:
      pyramid: of `correlation_pyramid`.
      points: (batch, rows, columns, 2), x and y in pixels of the finest level.
      radius: the window has 2 radius + 1 samples a side, one pixel of the level apart.

    Returns:
      (batch, rows, columns, levels * window), levels outermost, then rows of the window.
    """
    offsets = jnp.arange(-radius, radius + 1, dtype=points.dtype)
    windows = []
    for index, level in enumerate(pyramid):
        # Windows have the same number of samples in every level, so they reach twice as far in the
        # next.
        x, y = jnp.moveaxis(points / 2**index, -1, 0)[..., None] + offsets
        rows, columns = _hats(y, level.shape[3]), _hats(x, level.shape[4])
        window = rows @ level @ jnp.swapaxes(columns, -1, -2)
        windows.append(window.reshape(*window.shape[:3], -1))
    return jnp.concatenate(windows, axis=-1)


def _hats(positions: jax.Array, size: int) -> jax.Array:
    """Weights (..., samples, size) with which pixels 0 to size - 1 enter a sample at a position."""
    pixels = jnp.arange(size, dtype=positions.dtype)
    return jnp.maximum(0, 1 - jnp.abs(positions[..., None] - pixels))
