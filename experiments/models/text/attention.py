"""Multi-head attention, its masks, and sinusoidal positions.

The parameters are those of `flax.linen.MultiHeadDotProductAttention`: `query`, `key`, `value` of
shape (width, heads, head size) and `out` of shape (heads, head size, width), where plans look for
them. Keys and values are computed by a method of their own, so that decoding keeps them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class KeysValues(NamedTuple):
    """What is attended to.

    Attributes:
      keys: (batch, positions, heads, head size).
      values: the same.
    """

    keys: jax.Array
    values: jax.Array

    def write(self, index: jax.Array, new: KeysValues) -> KeysValues:
        """Puts the keys and values of one position, (batch, 1, ...), at `index`."""
        return KeysValues(
            jax.lax.dynamic_update_slice_in_dim(self.keys, new.keys, index, axis=1),
            jax.lax.dynamic_update_slice_in_dim(self.values, new.values, index, axis=1),
        )


class Attention(nn.Module):
    """Scaled dot-product attention with several heads.

    Attributes:
      width: of inputs and outputs; heads divide it.
      heads: how many.
      dtype: of the computation.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.
    """

    width: int
    heads: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Makes the four projections."""
        # In `setup`, because two methods use the projections, and only one method may be compact.
        split = (self.heads, self.width // self.heads)
        self.query = nn.DenseGeneral(split, dtype=self.dtype)
        self.key = nn.DenseGeneral(split, dtype=self.dtype)
        self.value = nn.DenseGeneral(split, dtype=self.dtype)
        self.out = nn.DenseGeneral(self.width, axis=(-2, -1), dtype=self.dtype)

    def keys_values(self, memory: jax.Array) -> KeysValues:
        """Projects what is attended to, (batch, positions, width)."""
        return KeysValues(self.key(memory), self.value(memory))

    def __call__(self, x: jax.Array, memory: KeysValues, mask: jax.Array) -> jax.Array:
        """Attends from `x` to `memory`.

        Args:
          x: (batch, queries, width).
          memory: of `keys_values`.
          mask: bool, broadcasts to (batch, heads, queries, positions); True may be seen. A query
            that may see nothing sees everything: its result is of no use, but finite.

        Returns:
          (batch, queries, width).
        """
        # The function divides by the square root of the head size itself.
        mixed = jax.nn.dot_product_attention(self.query(x), memory.keys, memory.values, mask=mask)
        return self.out(mixed)


def padding_mask(tokens: jax.Array, padding: int) -> jax.Array:
    """Which tokens may be seen, (batch, positions) -> (batch, 1, 1, positions)."""
    return (tokens != padding)[:, None, None, :]


def causal_mask(length: int) -> jax.Array:
    """Each position sees itself and those before it, (1, 1, length, length)."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def sinusoids(length: int, width: int) -> np.ndarray:
    """Positions as vectors: sines in the first half of the channels, cosines in the second.

    Wavelengths run from 2 pi to 10,000 * 2 pi. The paper's formula has the two interleaved, which
    is the same up to the order of channels.

    Args:
      length: positions.
      width: channels, even.

    Returns:
      float32 (length, width).

    Source: Vaswani et al., 2017, section 3.5.
    """
    # In NumPy and float64: for late positions float32 angles would be off by many ulps.
    rates = 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
