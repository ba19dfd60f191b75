"""Residual networks for ImageNet and for small images.

The layout is torchvision's, which the papers' tables use: a bottleneck block strides
in its 3x3 convolution ("version 1.5"), convolutions pad symmetrically, projections appear only
where the shape changes. Parameters are 11,689,512 for ResNet-18, 21,797,672 for ResNet-34 and
25,557,032 for ResNet-50 at 1000 classes; the tests count them.

Path rules can address every layer: "stem", "stage2_block1/conv1", "stage2_block1/shortcut",
"head".

Source: He et al., "Deep residual learning for image recognition", CVPR 2016, Table 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.images.conv_norm import Stem, check_stem, make_conv, make_head, make_norm


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Attributes:
      features: output channels.
      stride: of the first convolution.
      zero_init_last: start the last normalization's scale at 0, so that the block starts as the
        identity.
      dtype: of the computation; parameters are float32.
    """

    features: int
    stride: int = 1
    zero_init_last: bool = False
    dtype: Any = jnp.float32
    # Without an annotation, or Flax would make it an attribute of each block.
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, height, width, in) to (batch, height/stride, width/stride, features)."""
        conv, norm = partial(make_conv, dtype=self.dtype), partial(make_norm, dtype=self.dtype)
        y = conv(self.features, 3, self.stride, name="conv1")(x)
        y = nn.relu(norm(train, name="norm1")(y))
        y = conv(self.features, 3, 1, name="conv2")(y)
        y = norm(train, name="norm2", zero=self.zero_init_last)(y)
        if x.shape != y.shape:
            x = conv(y.shape[-1], 1, self.stride, name="shortcut")(x)
            x = norm(train, name="shortcut_norm")(x)
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the features, and a shortcut.

    Attributes:
      features: channels of the 3x3 convolution; the block returns four times as many.
      stride: of the 3x3 convolution.
      zero_init_last: start the last normalization's scale at 0, so that the block starts as the
        identity.
      dtype: of the computation; parameters are float32.
    """

    features: int
    stride: int = 1
    zero_init_last: bool = False
    dtype: Any = jnp.float32
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (batch, height, width, in) to (batch, height/stride, width/stride, 4 features)."""
        conv, norm = partial(make_conv, dtype=self.dtype), partial(make_norm, dtype=self.dtype)
        y = conv(self.features, 1, 1, name="conv1")(x)
        y = nn.relu(norm(train, name="norm1")(y))
        y = conv(self.features, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(train, name="norm2")(y))
        y = conv(self.features * self.expansion, 1, 1, name="conv3")(y)
        y = norm(train, name="norm3", zero=self.zero_init_last)(y)
        if x.shape != y.shape:
            x = conv(y.shape[-1], 1, self.stride, name="shortcut")(x)
            x = norm(train, name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network that returns logits.

    Attributes:
      stage_sizes: blocks in each stage; features double and the image halves from one stage to
        the next.
      block: `BasicBlock` or `BottleneckBlock`.
      num_classes: logits.
      width: features of the first stage.
      stem: "imagenet", a 7x7 convolution with stride 2 and a max-pool, or "cifar", a 3x3
        convolution, for small images.
      zero_init_last: see the blocks. Off in the recipe of the N:M papers.
      dtype: of the computation; parameters, running statistics and logits are float32.
    """

    stage_sizes: tuple[int, ...]
    block: type[BasicBlock] | type[BottleneckBlock]
    num_classes: int
    width: int = 64
    stem: Stem = "imagenet"
    zero_init_last: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        # A function and not a module, so that the paths of the layers get no prefix.
        stages = apply_stages(
            x,
            train,
            stage_sizes=self.stage_sizes,
            block=self.block,
            width=self.width,
            stem=self.stem,
            zero_init_last=self.zero_init_last,
            dtype=self.dtype,
        )
        # In float32, since a sum over the image loses bits in bfloat16.
        return make_head(self.num_classes)(stages[-1].mean(axis=(1, 2), dtype=jnp.float32))


def apply_stages(
    x: jax.Array,
    train: bool,
    *,
    stage_sizes: tuple[int, ...],
    block: type[BasicBlock] | type[BottleneckBlock],
    width: int,
    stem: Stem,
    zero_init_last: bool = False,
    dtype: Any = jnp.float32,
) -> list[jax.Array]:
    """Applies stem and stages inside of a compact module, whose submodules their layers become.

    Args:
      x: images (batch, height, width, channels).
      train: normalize by the batch's own statistics.
      stage_sizes: see `ResNet`, as the others.
      block: of the stages.
      width: features of the first stage.
      stem: "imagenet" or "cifar".
      zero_init_last: see the blocks.
      dtype: of the computation.

    Returns:
      What each stage puts out, (batch, rows, columns, features).
    """
    x, stages = _apply_stem(x.astype(dtype), train, width, stem, dtype), []
    for stage, blocks in enumerate(stage_sizes):
        for index in range(blocks):
            x = block(
                width * 2**stage,
                stride=2 if stage > 0 and index == 0 else 1,
                zero_init_last=zero_init_last,
                dtype=dtype,
                name=f"stage{stage + 1}_block{index + 1}",
            )(x, train)
        stages.append(x)
    return stages


def _apply_stem(x: jax.Array, train: bool, width: int, stem: Stem, dtype: Any) -> jax.Array:
    check_stem(stem)
    size, stride = (7, 2) if stem == "imagenet" else (3, 1)
    x = make_conv(width, size, stride, dtype=dtype, name="stem")(x)
    x = nn.relu(make_norm(train, dtype=dtype, name="stem_norm")(x))
    if stem == "imagenet":
        # Padded on both sides like torchvision's; "SAME" would pad even sides at their end only.
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    return x


# name -> (stage_sizes, block, width). The first four are for ImageNet, the last two are the
# 6n + 2 layers family for small images; any of them takes either stem.
_ARCHITECTURES: dict[str, tuple[tuple[int, ...], type[BasicBlock] | type[BottleneckBlock], int]] = {
    "resnet18": ((2, 2, 2, 2), BasicBlock, 64),
    "resnet34": ((3, 4, 6, 3), BasicBlock, 64),
    "resnet50": ((3, 4, 6, 3), BottleneckBlock, 64),
    "resnet101": ((3, 4, 23, 3), BottleneckBlock, 64),
    "resnet8": ((1, 1, 1), BasicBlock, 16),
    "resnet20": ((3, 3, 3), BasicBlock, 16),
}
RESNETS: tuple[str, ...] = tuple(_ARCHITECTURES)


def make_resnet(
    name: str,
    num_classes: int,
    *,
    stem: Stem = "imagenet",
    zero_init_last: bool = False,
    dtype: Any = jnp.float32,
) -> ResNet:
    """Makes a residual network by name.

    Args:
      name: one of `RESNETS`.
      num_classes: logits.
      stem: "imagenet" or "cifar".
      zero_init_last: start each block's last normalization scale at 0.
      dtype: of the computation, such as `jnp.bfloat16`.

    Raises:
      ValueError: if there is no such network.

    >>> make_resnet("resnet50", num_classes=1000).stage_sizes
    (3, 4, 6, 3)
    """
    if name not in _ARCHITECTURES:
        raise ValueError(f"no model named {name!r}; choose from {', '.join(RESNETS)}")
    stage_sizes, block, width = _ARCHITECTURES[name]
    return ResNet(
        stage_sizes=stage_sizes,
        block=block,
        num_classes=num_classes,
        width=width,
        stem=stem,
        zero_init_last=zero_init_last,
        dtype=dtype,
    )
