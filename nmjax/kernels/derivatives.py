"""The derivative of products with packed weights, whatever implementation runs forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nmjax.kernels import reference
from nmjax.kernels.operands import Activation, Window
from nmjax.packed.weight import Packed

Product = Callable[[jax.Array, Packed, jax.Array | None], jax.Array]


# Compiled kernels have no derivative of their own, so the backward pass is that of the definition.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def differentiable(
    product: Product,
    window: Window | None,
    activation: Activation,
    x: jax.Array,
    packed: Packed,
    bias: jax.Array | None,
) -> jax.Array:
    """Runs a product, and gives it a backward pass.

    Args:
      product: (x, packed, bias) -> y, with the activation.
      window: of a convolution, or None.
      activation: that `product` applies.
      x: rows (batch, inputs), or images (batch, *spatial, inputs).
      packed: one weight, not a stack.
      bias: (outputs,), or None.
    """
    del window, activation
    return product(x, packed, bias)


def _forward(
    product: Product, window: Window | None, activation: Activation, *operands: Any
) -> tuple[Any, Any]:
    y = differentiable(product, window, activation, *operands)
    return y, (operands, y)


def _backward(
    product: Product, window: Window | None, activation: Activation, saved: Any, g: jax.Array
) -> Any:
    """Through the dense product, which is linear: XLA drops its forward product."""
    del product
    (x, packed, bias), y = saved
    if activation == "relu":
        # From the output, so that no backend has to save its sums.
        g = jnp.where(y > 0, g, jnp.zeros_like(g))

    def linear(x: jax.Array, packed: Packed, bias: jax.Array | None) -> jax.Array:
        y = reference.dense_product(x, packed, window)
        return reference.finish(y, bias, None, packed.result_dtype(x))

    _, pull = jax.vjp(linear, x, packed, bias)
    return pull(g)


differentiable.defvjp(_forward, _backward)
