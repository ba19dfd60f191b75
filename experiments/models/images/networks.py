"""The image networks by name, and which of their layers the papers keep dense."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from experiments.models.images.conv_norm import Stem
from experiments.models.images.mobilenet import MobileNetV1
from experiments.models.images.resnet import RESNETS, make_resnet

IMAGE_NETWORKS: tuple[str, ...] = (*RESNETS, "mobilenet_v1")

# Projections are sparse where blocks are bottlenecks, and dense where they are not.
_DENSE_PROJECTIONS = ("resnet18", "resnet34", "resnet8", "resnet20")


def make_image_network(
    name: str, num_classes: int, *, stem: Stem = "imagenet", dtype: Any = jnp.float32
) -> nn.Module:
    """Makes a network by name, called as `network(images, train)`.

    Args:
      name: one of `IMAGE_NETWORKS`.
      num_classes: logits.
      stem: "imagenet" or "cifar", for small images.
      dtype: of the computation, such as `jnp.bfloat16`.

    Raises:
      ValueError: if there is no such network.
    """
    if name not in IMAGE_NETWORKS:
        raise ValueError(f"no model named {name!r}; choose from {', '.join(IMAGE_NETWORKS)}")
    if name in RESNETS:
        return make_resnet(name, num_classes, stem=stem, dtype=dtype)
    return MobileNetV1(num_classes, stem=stem, dtype=dtype)


def dense_layers(name: str, *, blocks: bool) -> tuple[str, ...]:
    """Path rules of the layers that the papers keep dense in a network.

    First and last layer; for blocks also the projections of ResNets without bottlenecks, as in
    SUBP. Depthwise convolutions need no rule: plans leave them dense.

    Args:
      name: one of `IMAGE_NETWORKS`.
      blocks: whether the pattern is one of 1xN blocks.

    Source: models/ and compute_flops.py of JingyangXiang/SUBP.
    """
    projections = ("/shortcut/",) if blocks and name in _DENSE_PROJECTIONS else ()
    return ("^stem/", "^head/", *projections)
