"""A residual network and the pyramid of feature maps over its stages.

Source: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017; layers as in
torchvision's `resnet50_fpn`, which the defaults are.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.images.conv_norm import Stem
from experiments.models.images.resnet import BasicBlock, BottleneckBlock, apply_stages

# uniform with variance 1 / fan in.
_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class FeaturePyramid(nn.Module):
    """Maps of all stages with the same number of channels, and one more of half the resolution.

    Attributes:
      stage_sizes: see `experiments.models.images.resnet.ResNet`, as the next three.
      block: of the stages.
      width: features of the first stage.
      stem: "imagenet" or "cifar".
      channels: of every map.
      dtype: of the computation.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    block: type[BasicBlock] | type[BottleneckBlock] = BottleneckBlock
    width: int = 64
    stem: Stem = "imagenet"
    channels: int = 256
    dtype: Any = jnp.float32

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image between two of each map, finest first."""
        # The ImageNet stem halves images twice: by its convolution and by its max-pool.
        first = 4 if self.stem == "imagenet" else 1
        return tuple(first * 2**level for level in range(len(self.stage_sizes) + 1))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> list[jax.Array]:
        """Maps images (batch, height, width, 3) to maps, finest first.

        Raises:
          ValueError: the images' sides are not multiples of the coarsest stride.
        """
        if x.shape[1] % self.strides[-1] or x.shape[2] % self.strides[-1]:
            raise ValueError(
                f"sides of images must be multiples of {self.strides[-1]}, got {x.shape}"
            )
        stages = apply_stages(
            x,
            train,
            stage_sizes=self.stage_sizes,
            block=self.block,
            width=self.width,
            stem=self.stem,
            dtype=self.dtype,
        )
        maps: list[jax.Array] = []
        for index in range(len(stages), 0, -1):
            y = self._conv(1, f"lateral{index}")(stages[index - 1])
            if maps:
                # Nearest neighbor, as in section 3. The sides match only because all strides divide
                # the image.
                y = y + jnp.repeat(jnp.repeat(maps[0], 2, axis=1), 2, axis=2)
            maps.insert(0, y)
        # After all sums, or the finer maps would be smoothed more than once. The 3x3 convolutions
        # reduce the aliasing of the enlarged maps.
        maps = [self._conv(3, f"out{index}")(y) for index, y in enumerate(maps, start=1)]
        # torchvision's extra level is a max-pool with a 1x1 window and stride 2: every other pixel.
        return [*maps, maps[-1][:, ::2, ::2]]

    def _conv(self, size: int, name: str) -> nn.Conv:
        return nn.Conv(self.channels, (size, size), kernel_init=_init, dtype=self.dtype, name=name)
