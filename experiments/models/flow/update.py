"""One step of RAFT: correlations and flow so far in, a change of the flow out.

Kernels start as in the released code, biases at zero.

Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020;
princeton-vl/RAFT.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

# uniform(-1/sqrt(fan in), 1/sqrt(fan in)): the variance of that is 1 / (3 fan in).
_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


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
        corr = nn.relu(_conv(self.corr[0], (1, 1), "corr1")(corr))
        corr = nn.relu(_conv(self.corr[1], (3, 3), "corr2")(corr))
        moved = nn.relu(_conv(self.flow[0], (7, 7), "flow1")(flow))
        moved = nn.relu(_conv(self.flow[1], (3, 3), "flow2")(moved))
        both = jnp.concatenate([corr, moved], axis=-1)
        # Two channels are left for the flow, which the next line appends.
        both = nn.relu(_conv(self.out - 2, (3, 3), "out")(both))
        return jnp.concatenate([both, flow], axis=-1)


class SeparableGRU(nn.Module):
    """A convolutional gated recurrent unit, first along rows (1x5), then along columns (5x1)."""

    @nn.compact
    def __call__(self, hidden: jax.Array, x: jax.Array) -> jax.Array:
        """Returns the next hidden state, (batch, rows, columns, hidden)."""
        width = hidden.shape[-1]
        # Two passes of five taps see as far as 5x5 kernels, with two fifths of the weights.
        for size, name in (((1, 5), "row"), ((5, 1), "column")):
            both = jnp.concatenate([hidden, x], axis=-1)
            update = nn.sigmoid(_conv(width, size, f"{name}_update")(both))
            reset = nn.sigmoid(_conv(width, size, f"{name}_reset")(both))
            both = jnp.concatenate([reset * hidden, x], axis=-1)
            new = nn.tanh(_conv(width, size, f"{name}_new")(both))
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
        change = nn.relu(_conv(self.head, (3, 3), "flow_head1")(hidden))
        change = _conv(2, (3, 3), "flow_head2")(change)
        logits = nn.relu(_conv(self.head, (3, 3), "upsample1")(hidden))
        logits = _conv(9 * self.factor**2, (1, 1), "upsample2")(logits)
        # A quarter, as in the released code, to balance the gradients of the two heads.
        return hidden, change, 0.25 * logits


def _conv(width: int, size: tuple[int, int], name: str) -> nn.Conv:
    return nn.Conv(width, size, kernel_init=_init, name=name)
