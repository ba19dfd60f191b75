"""RAFT: optical flow by looking up correlations and updating one flow field again and again.

Layers, widths and strides are those of the released model, which has 5,257,536 parameters; the
tests count them. Kernels start as there, biases at zero.

Path rules can address every layer: "features/stem", "context/stage2_block1/conv1",
"update/motion/corr1", "update/gru/row_update", "update/flow_head2".

Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020;
princeton-vl/RAFT.
"""

from __future__ import annotations

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.correlation import correlation_pyramid, look_up

Norm = Literal["instance", "batch"]

_encoder_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# uniform(-1/sqrt(fan in), 1/sqrt(fan in)): the variance of that is 1 / (3 fan in).
_update_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


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
        y = _encoder_conv(self.width, 3, self.stride, "conv1")(x)
        y = nn.relu(_normalise(y, self.norm, train, "norm1"))
        y = _encoder_conv(self.width, 3, 1, "conv2")(y)
        y = nn.relu(_normalise(y, self.norm, train, "norm2"))
        if x.shape != y.shape:
            x = _encoder_conv(self.width, 1, self.stride, "shortcut")(x)
            x = _normalise(x, self.norm, train, "shortcut_norm")
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
        x = _encoder_conv(self.widths[0], 7, stem, "stem")(x)
        x = nn.relu(_normalise(x, self.norm, train, "stem_norm"))
        for stage, (width, stride) in enumerate(zip(self.widths, strides, strict=True), start=1):
            for index in (1, 2):
                block = ResidualBlock(
                    width, stride if index == 1 else 1, self.norm, name=f"stage{stage}_block{index}"
                )
                x = block(x, train)
        return _encoder_conv(self.features, 1, 1, "out")(x)


class MotionEncoder(nn.Module):
    """Features of the correlations and of the flow so far, the flow itself appended.

    Attributes:
      corr: widths of the two layers over the correlations.
      flow: widths of the two layers over the flow.
      out: output channels, the flow's two among them.
    """

    corr: tuple[int, int]
    flow: tuple[int, int]
    out: int

    @nn.compact
    def __call__(self, corr: jax.Array, flow: jax.Array) -> jax.Array:
        """Maps (batch, rows, columns, ...) of both to (batch, rows, columns, out)."""
        corr = nn.relu(_update_conv(self.corr[0], (1, 1), "corr1")(corr))
        corr = nn.relu(_update_conv(self.corr[1], (3, 3), "corr2")(corr))
        moved = nn.relu(_update_conv(self.flow[0], (7, 7), "flow1")(flow))
        moved = nn.relu(_update_conv(self.flow[1], (3, 3), "flow2")(moved))
        both = jnp.concatenate([corr, moved], axis=-1)
        both = nn.relu(_update_conv(self.out - 2, (3, 3), "out")(both))
        return jnp.concatenate([both, flow], axis=-1)


class SeparableGRU(nn.Module):
    """A convolutional gated recurrent unit, first along rows (1x5), then along columns (5x1)."""

    @nn.compact
    def __call__(self, hidden: jax.Array, x: jax.Array) -> jax.Array:
        """Returns the next hidden state, (batch, rows, columns, hidden)."""
        width = hidden.shape[-1]
        for size, name in (((1, 5), "row"), ((5, 1), "column")):
            both = jnp.concatenate([hidden, x], axis=-1)
            update = nn.sigmoid(_update_conv(width, size, f"{name}_update")(both))
            reset = nn.sigmoid(_update_conv(width, size, f"{name}_reset")(both))
            both = jnp.concatenate([reset * hidden, x], axis=-1)
            new = nn.tanh(_update_conv(width, size, f"{name}_new")(both))
            hidden = (1 - update) * hidden + update * new
        return hidden


class Update(nn.Module):
    """One step: new hidden state, change of the flow, weights of its upsampling.

    Attributes:
      motion_corr: see `MotionEncoder`.
      motion_flow: see `MotionEncoder`.
      motion_out: see `MotionEncoder`.
      head: channels inside the two heads.
      factor: of the upsampling.
    """

    motion_corr: tuple[int, int]
    motion_flow: tuple[int, int]
    motion_out: int
    head: int
    factor: int

    @nn.compact
    def __call__(
        self, hidden: jax.Array, context: jax.Array, corr: jax.Array, flow: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Maps arrays (batch, rows, columns, ...) to hidden, change (..., 2) and logits."""
        encoder = MotionEncoder(self.motion_corr, self.motion_flow, self.motion_out, name="motion")
        motion = encoder(corr, flow)
        x = jnp.concatenate([context, motion], axis=-1)
        hidden = SeparableGRU(name="gru")(hidden, x)
        change = nn.relu(_update_conv(self.head, (3, 3), "flow_head1")(hidden))
        change = _update_conv(2, (3, 3), "flow_head2")(change)
        logits = nn.relu(_update_conv(self.head, (3, 3), "upsample1")(hidden))
        logits = _update_conv(9 * self.factor**2, (1, 1), "upsample2")(logits)
        # A quarter, as in the released code, to balance the gradients of the two heads.
        return hidden, change, 0.25 * logits


class Raft(nn.Module):
    """Estimates the flow from one image to the next. The defaults are the published model's.

    Attributes:
      widths: channels of both encoders' stages.
      strides: of both encoders; their product is the factor between images and flow field.
      features: channels that are correlated.
      hidden: channels of the recurrent state.
      context: channels that are the same at every step.
      levels: of the correlation pyramid.
      radius: of the windows looked up in it.
      motion_corr: see `MotionEncoder`.
      motion_flow: see `MotionEncoder`.
      motion_out: see `MotionEncoder`.
      head: channels inside the two heads.
      iterations: steps.
    """

    widths: tuple[int, ...] = (64, 96, 128)
    strides: tuple[int, ...] = (2, 1, 2, 2)
    features: int = 256
    hidden: int = 128
    context: int = 128
    levels: int = 4
    radius: int = 4
    motion_corr: tuple[int, int] = (256, 192)
    motion_flow: tuple[int, int] = (128, 64)
    motion_out: int = 128
    head: int = 256
    iterations: int = 12

    @nn.compact
    def __call__(self, first: jax.Array, second: jax.Array, train: bool) -> jax.Array:
        """Returns the flow from the first images to the second, in pixels.

        Args:
          first: (batch, height, width, 3), in [-1, 1]; sides are multiples of the strides'
            product.
          second: of the same shape.
          train: return the flow of every step, and normalise by the batch's own statistics.

        Returns:
          (steps, batch, height, width, 2), x and y: every step's in training, else the last one's
          only.

        Raises:
          ValueError: the images' sides are no multiples of the strides' product, or too small for
            the pyramid.
        """
        factor = math.prod(self.strides)
        if first.shape[1] % factor or first.shape[2] % factor:
            raise ValueError(f"sides of images must be multiples of {factor}, got {first.shape}")
        encoder = Encoder(self.widths, self.strides, self.features, "instance", name="features")
        maps = encoder(jnp.concatenate([first, second]), train)
        first_maps, second_maps = jnp.split(maps, 2)
        pyramid = correlation_pyramid(first_maps, second_maps, self.levels)
        state = Encoder(
            self.widths, self.strides, self.hidden + self.context, "batch", name="context"
        )(first, train)
        hidden, context = jnp.split(state, [self.hidden], axis=-1)
        hidden, context = nn.tanh(hidden), nn.relu(context)
        update = Update(
            self.motion_corr,
            self.motion_flow,
            self.motion_out,
            self.head,
            factor,
            name="update",
        )
        pixels = _pixels(hidden)
        flow, flows = jnp.zeros_like(pixels), []
        # Not a `scan`: XLA on a CPU is slow on convolutions inside of loops.
        for step in range(self.iterations):
            # The gradient of a step's flow does not reach earlier steps through the positions.
            flow = jax.lax.stop_gradient(flow)
            corr = look_up(pyramid, pixels + flow, self.radius)
            hidden, change, logits = update(hidden, context, corr, flow)
            flow = flow + change
            if train or step == self.iterations - 1:
                flows.append(convex_upsample(flow, logits, factor))
        return jnp.stack(flows)


def tiny_raft(iterations: int = 4) -> Raft:
    """A RAFT for images of 64 pixels: a field at a quarter of their size, few channels."""
    return Raft(
        widths=(16, 24, 32),
        strides=(2, 1, 2, 1),
        features=32,
        hidden=24,
        context=24,
        radius=3,
        motion_corr=(32, 24),
        motion_flow=(16, 8),
        motion_out=24,
        head=32,
        iterations=iterations,
    )


def convex_upsample(flow: jax.Array, logits: jax.Array, factor: int) -> jax.Array:
    """Enlarges a flow field, each new pixel a convex combination of 3x3 old ones.

    out[f i + a, f j + c] = sum_k softmax_k(logits[i, j, k, a, c]) f flow[i + di_k, j + dj_k], with
    zeros around the field.

    Args:
      flow: (batch, rows, columns, 2).
      logits: (batch, rows, columns, 9 factor^2): neighbours in row order, then a, then c.
      factor: f.

    Returns:
      (batch, factor rows, factor columns, 2).
    """
    batch, rows, columns, _ = flow.shape
    weights = logits.reshape(batch, rows, columns, 9, factor, factor)
    weights = nn.softmax(weights, axis=3)
    padded = jnp.pad(factor * flow, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbours = jnp.stack(
        [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], axis=3
    )
    fine = jnp.einsum("bijkac,bijkd->biajcd", weights, neighbours)
    return fine.reshape(batch, factor * rows, factor * columns, 2)


def _pixels(like: jax.Array) -> jax.Array:
    """The position (x, y) of every pixel, (batch, rows, columns, 2)."""
    batch, rows, columns, _ = like.shape
    y, x = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    grid = jnp.stack([x, y], axis=-1).astype(like.dtype)
    return jnp.broadcast_to(grid, (batch, rows, columns, 2))


def _encoder_conv(width: int, size: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(
        width,
        (size, size),
        (stride, stride),
        # "SAME" would pad a strided convolution on one side only, unlike the original.
        padding=size // 2,
        kernel_init=_encoder_init,
        name=name,
    )


def _update_conv(width: int, size: tuple[int, int], name: str) -> nn.Conv:
    return nn.Conv(width, size, kernel_init=_update_init, name=name)


def _normalise(x: jax.Array, norm: Norm, train: bool, name: str) -> jax.Array:
    if norm == "instance":
        return nn.InstanceNorm(epsilon=1e-5, use_bias=False, use_scale=False, name=name)(x)
    batch_norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)
    return batch_norm(x)
