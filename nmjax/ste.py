"""Pruning with a gradient: sparse in the forward pass, straight through in the backward.

The mask is constant to both functions: no gradient flows to it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def prune_ste(w: jax.Array, mask: jax.Array) -> jax.Array:
    """Sets masked-out weights to zero; the gradient passes through to every weight.

    Forward `w * mask`, backward `g -> g`, pruned entries included, so that a pruned weight goes on
    learning and can return.

    Args:
      w: weights, any shape, floating dtype.
      mask: booleans of `w`'s shape, True = kept.

    Returns:
      The pruned weights, of `w`'s shape and dtype. A pruned NaN or infinity is zero too.

    Raises:
      ValueError: `mask` has another shape.
      TypeError: `mask` is not boolean.

    Source: the straight-through estimator of Zhou et al., "Learning N:M Fine-grained Structured
    Sparse Neural Networks From Scratch", ICLR 2021.

    >>> w, mask = jnp.array([3.0, -1.0]), jnp.array([True, False])
    >>> jax.grad(lambda w: prune_ste(w, mask).sum())(w).tolist()
    [1.0, 1.0]
    """
    check_mask(w, mask)
    return _prune_ste(w, mask)


def prune_sr_ste(w: jax.Array, mask: jax.Array, lambda_w: ArrayLike) -> jax.Array:
    """Prunes like `prune_ste`; the backward pass pulls the pruned weights towards zero.

    Forward `w * mask`, backward `g -> g + lambda_w * ~mask * w`.

    The term is added wherever the backward pass runs. Under data parallelism that is once per
    replica where each replica computes its own gradient; average the gradients then, do not sum
    them. `nmjax.add_sparse_refined` adds the same term once, in the optimizer; use one or the
    other, not both.

    Args:
      w: weights, any shape, floating dtype.
      mask: booleans of `w`'s shape, True = kept.
      lambda_w: strength of the pull; a number or a scalar array, which may be traced, so a
        schedule does not recompile. Its own gradient is zero. The paper uses 2e-4.

    Returns:
      The pruned weights, of `w`'s shape and dtype.

    Raises:
      ValueError: `mask` has another shape, or `lambda_w` is not a scalar.
      TypeError: `mask` is not boolean.

    Source: SR-STE, Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From
    Scratch", ICLR 2021.

    >>> w, mask = jnp.array([3.0, -1.0]), jnp.array([True, False])
    >>> jax.grad(lambda w: prune_sr_ste(w, mask, 0.5).sum())(w).tolist()
    [1.0, 0.5]
    """
    check_mask(w, mask)
    check_lambda(lambda_w)
    return _prune_sr_ste(w, mask, jnp.asarray(lambda_w, dtype=jnp.result_type(w)))


def sparse_refined_term(w: jax.Array, mask: jax.Array, lambda_w: ArrayLike) -> jax.Array:
    """The term that SR-STE adds to the gradient, `lambda_w * ~mask * w`, in `w`'s dtype.

    A kept weight is told by its sparse value, not by its mask: the forward pass has stored the
    sparse weights already, whereas XLA would work out the mask again in every fusion that reads
    it. (A kept zero reads as pruned, and its pull is zero either way.)
    """
    kept = apply_mask(w, mask) != 0
    return jnp.where(kept, jnp.zeros_like(w), jnp.asarray(lambda_w, w.dtype) * w)


def apply_mask(w: jax.Array, mask: jax.Array) -> jax.Array:
    """`w` where the mask is True, else zero; a selection, so that pruned NaNs do not survive."""
    return jnp.where(mask, w, jnp.zeros_like(w))


def check_mask(w: jax.Array, mask: jax.Array, name: str = "the weight") -> None:
    """Raises ValueError or TypeError unless `mask` is boolean and of `w`'s shape."""
    if jnp.shape(mask) != jnp.shape(w):
        raise ValueError(
            f"the mask of {name} has shape {jnp.shape(mask)}, the weight {jnp.shape(w)}; a mask "
            "has one entry for each weight"
        )
    if jnp.result_type(mask) != jnp.bool_:
        raise TypeError(
            f"the mask of {name} has dtype {jnp.result_type(mask)}; masks are boolean with "
            "True = kept (use mask.astype(bool), or mask != 0)"
        )


def check_lambda(lambda_w: ArrayLike) -> None:
    """Raises ValueError unless `lambda_w` is a scalar; an array would broadcast over weights."""
    if np.ndim(lambda_w) != 0:
        raise ValueError(f"lambda_w must be a scalar, got an array of shape {np.shape(lambda_w)}")


@jax.custom_vjp
def _prune_ste(w: jax.Array, mask: jax.Array) -> jax.Array:
    return apply_mask(w, mask)


def _prune_ste_forward(w: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
    return apply_mask(w, mask), None


def _prune_ste_backward(_: None, g: jax.Array) -> tuple[jax.Array, None]:
    return g, None


_prune_ste.defvjp(_prune_ste_forward, _prune_ste_backward)


@jax.custom_vjp
def _prune_sr_ste(w: jax.Array, mask: jax.Array, lambda_w: jax.Array) -> jax.Array:
    del lambda_w
    return apply_mask(w, mask)


def _prune_sr_ste_forward(
    w: jax.Array, mask: jax.Array, lambda_w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return apply_mask(w, mask), (w, mask, lambda_w)


def _prune_sr_ste_backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    w, mask, lambda_w = residuals
    return g + sparse_refined_term(w, mask, lambda_w), None, jnp.zeros_like(lambda_w)


_prune_sr_ste.defvjp(_prune_sr_ste_forward, _prune_sr_ste_backward)
