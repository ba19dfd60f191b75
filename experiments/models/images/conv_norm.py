"""Convolution, normalization and last layer, as torchvision's image networks have them."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

# What comes first: made for ImageNet's images, or for small ones.
Stem = Literal["imagenet", "cifar"]

# normal(0, sqrt(2 / (k * k * C_out))), not truncated.
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# uniform(-1/sqrt(C_in), 1/sqrt(C_in)): the variance of that is 1 / (3 C_in).
_head_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def make_conv(
    features: int, size: int, stride: int, *, name: str, groups: int = 1, dtype: Any = jnp.float32
) -> nn.Conv:
    """A convolution of `size` x `size` without bias, padded alike on all sides."""
    # "SAME" would pad a strided convolution on one side only, unlike the original.
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=size // 2,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=_conv_init,
        dtype=dtype,
        name=name,
    )


def make_norm(
    train: bool, *, name: str, zero: bool = False, dtype: Any = jnp.float32
) -> nn.BatchNorm:
    """Batch normalization; `zero` starts its scale at 0."""
    init = nn.initializers.zeros if zero else nn.initializers.ones
    # Flax's momentum is the share of the old statistics: PyTorch's default 0.1 is 0.9 here.
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        scale_init=init,
        dtype=dtype,
        name=name,
    )


def make_head(num_classes: int) -> nn.Dense:
    """The layer named "head" that makes logits of the mean over the image, in float32."""
    # No dtype: the float32 of input and parameters decides, whatever the network computes in.
    return nn.Dense(num_classes, kernel_init=_head_init, name="head")


def check_stem(stem: str) -> None:
    """Raises ValueError for an unknown stem."""
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
