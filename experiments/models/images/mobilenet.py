"""MobileNetV1, for ImageNet and for small images.

Thirteen blocks of a depthwise 3x3 and a 1x1 convolution, each followed by normalization and ReLU.
At 1000 classes it has 4,231,976 parameters and 568,740,352 multiply-adds; the tests count them.

Path rules can address every layer: "stem", "block3/depthwise", "block3/pointwise", "head". Plans
leave the depthwise convolutions dense by themselves.

Source: Howard et al., "MobileNets: efficient convolutional neural networks for mobile vision
applications", 2017, arXiv 1704.04861, Table 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.images.conv_norm import Stem, check_stem, make_conv, make_head, make_norm

# Features and stride of each block.
_BLOCKS = (
    (64, 1),
    *((128, 2), (128, 1)),
    *((256, 2), (256, 1)),
    *((512, 2), *5 * ((512, 1),)),
    *((1024, 2), (1024, 1)),
)


class SeparableBlock(nn.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across them.

    Attributes:
      features: output channels.
      stride: of the 3x3 convolution.
      dtype: of the computation; parameters are float32.
    """

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, height, width, in) to (batch, height/stride, width/stride, features)."""
        conv, norm = partial(make_conv, dtype=self.dtype), partial(make_norm, dtype=self.dtype)
        channels = x.shape[-1]
        x = conv(channels, 3, self.stride, groups=channels, name="depthwise")(x)
        x = nn.relu(norm(train, name="depthwise_norm")(x))
        x = conv(self.features, 1, 1, name="pointwise")(x)
        return nn.relu(norm(train, name="pointwise_norm")(x))


class MobileNetV1(nn.Module):
    """MobileNetV1 that returns logits.

    Attributes:
      num_classes: logits.
      stem: "imagenet", with stride 2, or "cifar", with stride 1, for small images.
      dtype: of the computation; parameters, running statistics and logits are float32.
    """

    num_classes: int
    stem: Stem = "imagenet"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        check_stem(self.stem)
        # Only the stem differs: the blocks still divide both sides by 16, so 32 pixels become 2.
        stride = 2 if self.stem == "imagenet" else 1
        x = make_conv(32, 3, stride, dtype=self.dtype, name="stem")(x.astype(self.dtype))
        x = nn.relu(make_norm(train, dtype=self.dtype, name="stem_norm")(x))
        for index, (features, stride) in enumerate(_BLOCKS):
            block = SeparableBlock(features, stride, self.dtype, name=f"block{index + 1}")
            x = block(x, train)
        # In float32, since a sum over the image loses bits in bfloat16.
        return make_head(self.num_classes)(x.mean(axis=(1, 2), dtype=jnp.float32))
