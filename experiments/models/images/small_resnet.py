"""A residual network for 8x8 images, with convolutions written as matrix products.

XLA on a CPU is slow on the small convolutions that training several networks at once produces:
grouped ones under `jax.vmap`, and any convolution inside a loop. The same sums written as one
matrix product over unfolded patches run many times faster there, with the same parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# normal(0, sqrt(2 / (k * k * C_out))), as in the recipe of the N:M papers.
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv_by_matmul(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """A 2-D convolution as one matrix product; for `nn.Conv(conv_general_dilated=...)`.

    Args:
      x: images (batch, height, width, in).
      kernel: (rows, columns, in, out).
      window_strides: of the rows and of the columns.
      padding: "SAME", "VALID", or pixels before and after, along rows and along columns.
      **options: other arguments of `lax.conv_general_dilated`; dilation and groups must be 1.

    Returns:
      Images (batch, out height, out width, out), the values of `lax.conv_general_dilated`.

    Raises:
      NotImplementedError: the convolution is dilated or grouped.
    """
    dilations = [*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ())]
    if options.get("feature_group_count", 1) != 1 or any(d != 1 for d in dilations):
        raise NotImplementedError("only plain convolutions: no dilation, no groups")
    rows, columns, _, features = kernel.shape
    down, right = window_strides
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], (rows, columns), (down, right), padding)
    x = jnp.pad(x, ((0, 0), *((int(a), int(b)) for a, b in padding), (0, 0)))
    height = (x.shape[1] - rows) // down + 1
    width = (x.shape[2] - columns) // right + 1
    # Every slice ends right behind the last pixel that it reads: an open one would go on to the
    # border and give each tap another number of pixels.
    taps = [
        x[:, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * right + 1 : right]
        for i in range(rows)
        for j in range(columns)
    ]
    # Channels of all taps side by side, tap by tap, as the kernel's rows are once it is flattened.
    return jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, features)


def _conv(features: int, size: int, stride: int, unfold: bool, *, name: str) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=size // 2,
        use_bias=False,
        kernel_init=_conv_init,
        conv_general_dilated=conv_by_matmul if unfold else None,
        name=name,
    )


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    features: int
    stride: int
    unfold: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, height, width, in) to (batch, height/stride, width/stride, features)."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = partial(_conv, self.features, unfold=self.unfold)
        y = conv(3, self.stride, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = norm(name="norm2")(conv(3, 1, name="conv2")(y))
        if x.shape != y.shape:
            x = conv(1, self.stride, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class SmallResNet(nn.Module):
    """A 3x3 convolution, one block a stage, the mean over the image, a dense layer.

    Attributes:
      widths: features of the stages; each after the first halves the image.
      num_classes: logits.
      unfold: write convolutions as matrix products. Not for tracing channels, which an unfolded
        patch mixes with its pixels.
    """

    widths: tuple[int, ...]
    num_classes: int
    unfold: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        x = _conv(self.widths[0], 3, 1, self.unfold, name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="stem_norm")(x)
        x = nn.relu(x)
        for index, features in enumerate(self.widths):
            stride = 1 if index == 0 else 2
            x = Block(features, stride, self.unfold, name=f"block{index + 1}")(x, train)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))
