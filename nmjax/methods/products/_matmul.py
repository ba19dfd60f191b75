"""A product with another weight, and 2:4 gradients, in the backward pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from nmjax.methods.products._mvue import mvue_24

if TYPE_CHECKING:
    import chex
    from jaxtyping import Array, Float


def training_matmul(
    x: Float[chex.Array, "*tokens inputs"],
    w: Float[chex.Array, "inputs outputs"],
    *,
    backward: Float[chex.Array, "inputs outputs"] | None = None,
    key: chex.PRNGKey | None = None,
) -> Float[Array, "*tokens outputs"]:
    """Multiplies by one weight forward and by another backward, with 2:4 gradients if asked.

        y = x w,   dx = dy b^T,   dw = x^T mvue_24(dy)

    For weights that are N:M along their inputs only, `backward` is what makes the gradient of the
    input a product with an N:M weight too: `nmjax.methods.backward_weights` of `bi_mask`. With
    `key`, the gradient of the weight is a product with 2:4 gradients, drawn by
    `nmjax.methods.mvue_24` over the tokens. XLA computes all three products densely.

    Args:
      x: inputs.
      w: sparse weight of the forward pass; it gets the gradient.
      backward: b, the weight of the backward pass. It gets no gradient. None for `w`.
      key: a fresh random key for each call; None for the exact gradient of the weight.

    Raises:
      ValueError: shapes do not fit; with `key`, 4 does not divide the number of tokens.

    Source: Zhang et al., "Bi-directional Masks for Efficient N:M Sparse Training", ICML 2023; Hu et
    al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024.

    >>> x, w = jnp.ones((4, 2)), jnp.array([[2.0], [3.0]])
    >>> b = jnp.array([[2.0], [0.0]])
    >>> jax.grad(lambda x: training_matmul(x, w, backward=b).sum())(x)[0].tolist()
    [2.0, 0.0]
    """
    b = w if backward is None else backward
    if w.ndim != 2 or x.shape[-1:] != w.shape[:1] or b.shape != w.shape:
        raise ValueError(
            f"x {x.shape}, w {w.shape} and backward {b.shape} should be (..., inputs), (inputs, "
            "outputs) and (inputs, outputs)"
        )
    tokens = math.prod(x.shape[:-1])
    if key is not None and tokens % 4:
        raise ValueError(f"2:4 gradients need a multiple of 4 tokens, x {x.shape} has {tokens}")
    y = _multiply(x.reshape(tokens, -1), w, jax.lax.stop_gradient(b), key)
    return y.reshape(*x.shape[:-1], w.shape[1])


@jax.custom_vjp
def _multiply(x: jax.Array, w: jax.Array, b: jax.Array, key: chex.PRNGKey | None) -> jax.Array:
    del b, key
    return jnp.matmul(x, w)


def _multiply_forward(
    x: jax.Array, w: jax.Array, b: jax.Array, key: chex.PRNGKey | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    return jnp.matmul(x, w), (x, jnp.zeros([], w.dtype), b, key)


def _multiply_backward(residuals: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
    x, w, b, key = residuals
    drawn = g if key is None else mvue_24(g, key)
    dx, dw = jnp.matmul(g, b.T), jnp.matmul(x.T, drawn)
    return dx.astype(x.dtype), dw.astype(w.dtype), None, None


_multiply.defvjp(_multiply_forward, _multiply_backward)
