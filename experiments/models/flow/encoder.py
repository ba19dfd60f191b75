"""RAFT's encoder: a residual network that keeps an eighth of the image's resolution.

Kernels start as in the released code, biases at zero.

Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020;
princeton-vl/RAFT.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax

Norm = Literal["instance", "batch"]

_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes.

    Attributes:
      width: output channels.
      stride: of the first convolution.
      norm: of every convolution.
    """

    width: int
    stride: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, rows, columns, in) to (batch, rows/stride, columns/stride, width)."""
        y = _conv(self.width, 3, self.stride, "conv1")(x)
        y = nn.relu(_normalize(y, self.norm, train, "norm1"))
        y = _conv(self.width, 3, 1, "conv2")(y)
        # ReLU comes before the sum too, unlike in a ResNet, as in the released code.
        y = nn.relu(_normalize(y, self.norm, train, "norm2"))
        if x.shape != y.shape:
            x = _conv(self.width, 1, self.stride, "shortcut")(x)
            x = _normalize(x, self.norm, train, "shortcut_norm")
        return nn.relu(x + y)


class Encoder(nn.Module):
    """A 7x7 convolution, stages of two residual blocks, a 1x1 convolution.

    Attributes:
      widths: channels of the stages; the stem has those of the first.
      strides: of the stem and of each stage's first block.
      features: output channels.
      norm: "instance", without parameters, or "batch".
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    features: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (batch, height, width, 3) to (batch, height/s, width/s, features)."""
        stem, *strides = self.strides
        x = _conv(self.widths[0], 7, stem, "stem")(x)
        x = nn.relu(_normalize(x, self.norm, train, "stem_norm"))
        for stage, (width, stride) in enumerate(zip(self.widths, strides, strict=True), start=1):
            for index in (1, 2):
                block = ResidualBlock(
                    width, stride if index == 1 else 1, self.norm, name=f"stage{stage}_block{index}"
                )
                x = block(x, train)
        return _conv(self.features, 1, 1, "out")(x)


def _conv(width: int, size: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(
        width,
        (size, size),
        (stride, stride),
        # "SAME" would pad a strided convolution on one side only, unlike the original.
        padding=size // 2,
        kernel_init=_init,
        name=name,
    )


def _normalize(x: jax.Array, norm: Norm, train: bool, name: str) -> jax.Array:
    if norm == "instance":
        # PyTorch's instance normalization has no scale and bias unless asked for.
        return nn.InstanceNorm(epsilon=1e-5, use_bias=False, use_scale=False, name=name)(x)
    # Flax's momentum is the share of the old statistics: PyTorch's default 0.1 is 0.9 here.
    batch_norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)
    return batch_norm(x)
