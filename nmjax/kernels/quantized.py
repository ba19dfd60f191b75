"""Packed N:M weights with int8 values and one scale for each output.

At 2:4 they take 2.5 bytes for 4 weights; packed bfloat16 takes 4.5 and dense bfloat16 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.kernels.operands import Activation
from nmjax.kernels.reference import finish, sums
from nmjax.packed.nm import PackedNM

_LARGEST = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class QuantizedNM:
    """A packed weight with integer values, `packed.values * scales`; a pytree node of three arrays.

    Attributes:
      packed: as `nmjax.pack` makes it, with values of int8.
      scales: float32 (*stack, outputs).
    """

    packed: PackedNM
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.packed.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.packed.nbytes + self.scales.size * self.scales.dtype.itemsize


def quantize(packed: PackedNM) -> QuantizedNM:
    """Rounds the values of each output to 255 steps, symmetric around zero; the largest is exact.

    NaN and infinities stay visible: every product of that output is NaN or infinite.

    Args:
      packed: a leaf of what `nmjax.pack` returns, N:M, of any floating dtype.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[1.0], [0.0], [-12.7], [0.0]])}
    >>> packed = nmjax.pack(params, nmjax.make_plan(params, "2:4"))
    >>> quantize(packed["kernel"]).packed.values.ravel().tolist()
    [10, -127]
    """
    values = packed.values.astype(jnp.float32)
    largest = jnp.abs(values).max(axis=(-3, -2), keepdims=True)
    # An output of zeros keeps scale 1, since 0 / 0 would be NaN.
    scales = jnp.where(largest == 0, 1, largest / _LARGEST)
    steps = jnp.round(values / scales)
    # The scale of such an output is NaN or infinite, and any nonzero integer keeps it so.
    steps = jnp.where(jnp.isfinite(steps), steps, 1).astype(jnp.int8)
    return QuantizedNM(packed.with_values(steps), scales[..., 0, 0, :])


def dequantize(w: QuantizedNM, dtype: np.dtype) -> PackedNM:
    """The packed weight with values of a floating dtype."""
    values = w.packed.values.astype(jnp.float32) * w.scales[..., None, None, :]
    return w.packed.with_values(values.astype(dtype))


def matmul(
    x: jax.Array,
    w: QuantizedNM,
    bias: jax.Array | None = None,
    activation: Activation = None,
) -> jax.Array:
    """Multiplies x (batch, inputs) by the weight in plain XLA: (batch, outputs), of x's dtype.

    This defines the kernel for few rows. Products of `x` with the integers, which every floating
    dtype of at least 16 bits holds exactly, are summed in float32. Scales, bias and activation are
    applied to the sums.
    """
    integers = w.packed.with_values(w.packed.values.astype(x.dtype))
    y = sums(x, integers)
    return finish(y * w.scales[None], bias, activation, x.dtype)
