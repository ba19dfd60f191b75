"""RAFT: optical flow by looking up correlations and updating one flow field again and again.

Layers, widths and strides are those of the released model, which has 5,257,536 parameters; the
tests count them.

Path rules can address every layer: "features/stem", "context/stage2_block1/conv1",
"update/motion/corr1", "update/gru/row_update", "update/flow_head2".

Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020;
princeton-vl/RAFT.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.flow.correlation import center_and_scale, correlation_pyramid, look_up
from experiments.models.flow.encoder import Encoder
from experiments.models.flow.update import Update


class Raft(nn.Module):
    """Estimates the flow from one image to the next. The defaults are the published model's.

    Attributes:
      widths: channels of both encoders' stages.
      strides: of both encoders; their product is the factor between images and flow field.
      features: channels that are correlated.
      unit_features: center them over each image and scale them to one length before they are
        correlated. The published model learns this in 200,000 steps instead.
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
    unit_features: bool = False
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
          train: return the flow of every step, and normalize by the batch's own statistics.

        Returns:
          (steps, batch, height, width, 2), x and y: every step's in training, else the last one's
          only.

        Raises:
          ValueError: the images' sides are not multiples of the strides' product, or too small for
            the pyramid.
        """
        factor = math.prod(self.strides)
        if first.shape[1] % factor or first.shape[2] % factor:
            raise ValueError(f"sides of images must be multiples of {factor}, got {first.shape}")
        encoder = Encoder(self.widths, self.strides, self.features, "instance", name="features")
        # Both in one pass: instance normalization keeps images apart, and the batch is twice as
        # large.
        maps = encoder(jnp.concatenate([first, second]), train)
        if self.unit_features:
            maps = center_and_scale(maps)
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
            # Only what is returned is enlarged: the steps go on from the coarse field.
            if train or step == self.iterations - 1:
                flows.append(convex_upsample(flow, logits, factor))
        return jnp.stack(flows)


def tiny_raft(iterations: int = 3) -> Raft:
    """A RAFT for images of 64 pixels: a field at a quarter of their size, few channels and layers.

    Its features have a small receptive field, so even untrained ones can be matched. Only the stem
    shrinks the images, and windows have a radius of 2, which saves work.
    """
    return Raft(
        widths=(32,),
        strides=(4, 1),
        features=32,
        unit_features=True,
        hidden=24,
        context=24,
        radius=2,
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
      logits: (batch, rows, columns, 9 factor^2): neighbors in row order, then a, then c.
      factor: f.

    Returns:
      (batch, factor rows, factor columns, 2).
    """
    batch, rows, columns, _ = flow.shape
    weights = logits.reshape(batch, rows, columns, 9, factor, factor)
    weights = nn.softmax(weights, axis=3)
    # A coarse pixel is `factor` fine ones wide, and the flow is in pixels.
    padded = jnp.pad(factor * flow, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbors = jnp.stack(
        [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], axis=3
    )
    fine = jnp.einsum("bijkac,bijkd->biajcd", weights, neighbors)
    return fine.reshape(batch, factor * rows, factor * columns, 2)


def _pixels(like: jax.Array) -> jax.Array:
    """The position (x, y) of every pixel, (batch, rows, columns, 2)."""
    batch, rows, columns, _ = like.shape
    y, x = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    grid = jnp.stack([x, y], axis=-1).astype(like.dtype)
    return jnp.broadcast_to(grid, (batch, rows, columns, 2))
