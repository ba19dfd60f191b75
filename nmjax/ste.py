"""Pruning with a gradient: sparse in the forward pass, straight through in the backward pass.

Both functions treat the mask as a constant: no gradient flows to it.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    import chex
    from jaxtyping import Array, Bool, Float

    _Residuals = tuple[chex.Array, chex.Array, chex.Array]  # w, sparse, lambda_w


Prune = Callable[..., jax.Array]


def prune_ste(
    w: Float[chex.Array, "*shape"], mask: Bool[chex.Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Sets pruned weights to zero; the gradient passes through to every weight (STE).

    Forward `w * mask`, backward `g -> g`. Pruned weights keep learning, so they can return.

    Args:
      w: weights, floating dtype.
      mask: True = kept.

    Returns:
      The pruned weights, in `w`'s dtype. Where the mask is False the result is zero, even if the
      weight is NaN or infinite.

    Raises:
      ValueError: `mask` has another shape than `w`.
      TypeError: `w` does not have a real floating dtype; `mask` is not boolean.

    Source: the straight-through estimator of Zhou et al., "Learning N:M Fine-grained Structured
    Sparse Neural Networks From Scratch", ICLR 2021.

    >>> w, mask = jnp.array([3.0, -1.0]), jnp.array([True, False])
    >>> jax.grad(lambda w: prune_ste(w, mask).sum())(w).tolist()
    [1.0, 1.0]
    """
    check_weight(w)
    check_mask(w, mask)
    return straight_through(apply_mask, w, mask)


def prune_sr_ste(
    w: Float[chex.Array, "*shape"], mask: Bool[chex.Array, "*shape"], lambda_w: chex.Numeric
) -> Float[Array, "*shape"]:
    """Prunes like `prune_ste`, and pulls the pruned weights toward zero (SR-STE).

    Forward `w * mask`, backward `g -> g + lambda_w * ~mask * w`.

    The term joins the gradient in the backward pass, so everything that happens to the gradient
    there happens to the term:

    - It is added once for each use of a shared layer that is pruned in every call.
    - It does not grow with the loss. With loss scaling it shrinks when the gradients are unscaled.
    - Every replica adds it, so average the gradients over replicas; a sum would multiply it.

    `nmjax.add_sparse_refined` adds the same term once, in the optimizer, and avoids all three. Do
    not use both.

    Args:
      w: weights, floating dtype.
      mask: True = kept.
      lambda_w: strength of the pull, a number or a scalar array. It may be traced, so a schedule
        does not recompile. Its own gradient is zero. The paper uses 2e-4.

    Returns:
      The pruned weights, as from `prune_ste`.

    Raises:
      ValueError: `mask` has another shape than `w`; `lambda_w` is not a scalar or not finite.
      TypeError: `w` does not have a real floating dtype; `mask` is not boolean; `lambda_w` is not
        a number.

    Source: SR-STE, Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From
    Scratch", ICLR 2021.

    >>> w, mask = jnp.array([3.0, -1.0]), jnp.array([True, False])
    >>> jax.grad(lambda w: prune_sr_ste(w, mask, 0.5).sum())(w).tolist()
    [1.0, 0.5]
    """
    check_weight(w)
    check_mask(w, mask)
    check_lambda(lambda_w)
    return sparse_refined(lambda_w, apply_mask, w, mask)


def straight_through(prune: Prune, w: Float[chex.Array, "*shape"], *given: Any) -> jax.Array:
    """`prune(w, *given)`, with the gradient of `prune_ste`: all of it goes to `w`.

    `prune` may round to another dtype; gradients arrive in that of `w`.
    """
    return _straight_through(prune, jnp.result_type(w), w, given)


def sparse_refined(
    lambda_w: chex.Numeric, prune: Prune, w: Float[chex.Array, "*shape"], *given: Any
) -> jax.Array:
    """`prune(w, *given)`, with the gradient of `prune_sr_ste`."""
    return _sparse_refined(prune, w, given, jnp.asarray(lambda_w, dtype=jnp.result_type(w)))


def replace_ste(
    w: Float[chex.Array, "*shape"], value: Float[chex.Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Forward `value`, whatever it is; backward the cotangent, to `w` alone.

    >>> w = jnp.array([3.0, -1.0])
    >>> jax.grad(lambda w: replace_ste(w, 0.5 * w).sum())(w).tolist()
    [1.0, 1.0]
    """
    return _replace_ste(w, value)


def pull_pruned(
    w: Float[chex.Array, "*shape"], mask: Bool[chex.Array, "*shape"], lambda_w: chex.Numeric
) -> Float[Array, "*shape"]:
    """Forward `w`; backward `g -> g + lambda_w * ~mask * w`, the term of SR-STE alone.

    >>> w, mask = jnp.array([3.0, -1.0]), jnp.array([True, False])
    >>> jax.grad(lambda w: pull_pruned(w, mask, 0.5).sum())(w).tolist()
    [1.0, 0.5]
    """
    return _pull_pruned(w, mask, jnp.asarray(lambda_w, dtype=jnp.result_type(w)))


def sparse_refined_term(
    w: Float[chex.Array, "*shape"], sparse: Float[chex.Array, "*shape"], lambda_w: chex.Numeric
) -> Float[Array, "*shape"]:
    """The term that SR-STE adds to the gradient, `lambda_w * ~mask * w`, in `w`'s dtype.

    Args:
      w: weights.
      sparse: `w` where the mask is True, else zero.
      lambda_w: strength.
    """
    # Reads "kept" off the sparse weights, not off the mask. The forward pass has stored the
    # sparse weights already, whereas XLA would compute the mask again in every fusion that reads
    # it. A kept weight that is zero looks pruned here, but its pull is zero either way.
    return jnp.where(sparse != 0, jnp.zeros_like(w), jnp.asarray(lambda_w, w.dtype) * w)


def apply_mask(
    w: Float[chex.Array, "*shape"], mask: Bool[chex.Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`w` where the mask is True, else zero."""
    # A selection, not a product: NaN * 0 is NaN.
    return jnp.where(mask, w, jnp.zeros_like(w))


def check_has_values(x: Any, what: str) -> None:
    """Raises TypeError if `x` is the shape of an array, not an array."""
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{what} must be an array, got a ShapeDtypeStruct, which has no values: {x.dtype}"
            f"{x.shape}; for the shape of a result, call jax.eval_shape"
        )


def check_mask(w: chex.Array, mask: chex.Array, name: str = "the weight") -> None:
    """Raises ValueError or TypeError unless `mask` is boolean and has the shape of `w`."""
    if not hasattr(mask, "shape") or not hasattr(mask, "dtype"):
        raise TypeError(
            f"the mask of {name} must be a boolean array with True = kept, got "
            f"{type(mask).__name__}"
        )
    check_has_values(mask, f"the mask of {name}")
    if jnp.shape(mask) != jnp.shape(w):
        raise ValueError(
            f"the mask of {name} has shape {jnp.shape(mask)}, but the weight has shape "
            f"{jnp.shape(w)}; a mask needs one entry per weight"
        )
    if jnp.result_type(mask) != jnp.bool_:
        raise TypeError(
            f"the mask of {name} has dtype {jnp.result_type(mask)}; masks are boolean with "
            "True = kept (use mask.astype(bool), or mask != 0)"
        )


def check_lambda(lambda_w: chex.Numeric) -> None:
    """Raises TypeError or ValueError unless `lambda_w` is a finite scalar."""
    is_array = hasattr(lambda_w, "shape") and hasattr(lambda_w, "dtype")
    if isinstance(lambda_w, bool) or not (is_array or isinstance(lambda_w, numbers.Real)):
        raise TypeError(
            f"lambda_w must be a number or a scalar array, such as 2e-4; got {lambda_w!r} of type "
            f"{type(lambda_w).__name__}"
        )
    check_has_values(lambda_w, "lambda_w")
    # An array would broadcast over the weights without an error.
    if np.ndim(lambda_w) != 0:
        raise ValueError(f"lambda_w must be a scalar, got an array of shape {np.shape(lambda_w)}")
    if is_array and not jnp.issubdtype(lambda_w.dtype, jnp.number):
        raise TypeError(f"lambda_w must be a real number, got an array of {lambda_w.dtype}")
    # Arrays of JAX are not read: that would wait for the device in every step.
    if not isinstance(lambda_w, jax.Array) and not np.isfinite(lambda_w):
        raise ValueError(f"lambda_w must be finite, got {lambda_w}")


def check_weight(w: chex.Array) -> None:
    """Raises TypeError unless `w` is an array of a real floating dtype."""
    if not hasattr(w, "shape") or not hasattr(w, "dtype"):
        raise TypeError(f"expected an array of weights, got {type(w).__name__}")
    check_has_values(w, "the weight")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"weights must have a real floating dtype, got {w.dtype}")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _straight_through(
    prune: Prune, dtype: np.dtype, w: Float[chex.Array, "*shape"], given: tuple[Any, ...]
) -> Float[Array, "*shape"]:
    del dtype
    return prune(w, *given)


def _straight_through_forward(
    prune: Prune, dtype: np.dtype, w: Float[chex.Array, "*shape"], given: tuple[Any, ...]
) -> tuple[chex.Array, None]:
    del dtype
    return prune(w, *given), None


def _straight_through_backward(
    prune: Prune, dtype: np.dtype, residuals: None, g: chex.Array
) -> tuple[chex.Array, None]:
    del prune, residuals
    return g.astype(dtype), None


_straight_through.defvjp(_straight_through_forward, _straight_through_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sparse_refined(
    prune: Prune,
    w: Float[chex.Array, "*shape"],
    given: tuple[Any, ...],
    lambda_w: Float[Array, ""],
) -> Float[Array, "*shape"]:
    del lambda_w
    return prune(w, *given)


def _sparse_refined_forward(
    prune: Prune,
    w: Float[chex.Array, "*shape"],
    given: tuple[Any, ...],
    lambda_w: Float[Array, ""],
) -> tuple[chex.Array, _Residuals]:
    sparse = prune(w, *given)
    return sparse, (w, sparse, lambda_w)


def _sparse_refined_backward(
    prune: Prune, residuals: _Residuals, g: chex.Array
) -> tuple[chex.Array, None, chex.Array]:
    del prune
    w, sparse, lambda_w = residuals
    term = sparse_refined_term(w, sparse, lambda_w)
    return g.astype(w.dtype) + term, None, jnp.zeros_like(lambda_w)


_sparse_refined.defvjp(_sparse_refined_forward, _sparse_refined_backward)


@jax.custom_vjp
def _replace_ste(
    w: Float[chex.Array, "*shape"], value: Float[chex.Array, "*shape"]
) -> Float[chex.Array, "*shape"]:
    del w
    return value


def _replace_ste_forward(
    w: Float[chex.Array, "*shape"], value: Float[chex.Array, "*shape"]
) -> tuple[chex.Array, None]:
    del w
    return value, None


def _replace_ste_backward(_: None, g: chex.Array) -> tuple[chex.Array, None]:
    return g, None


_replace_ste.defvjp(_replace_ste_forward, _replace_ste_backward)


@jax.custom_vjp
def _pull_pruned(
    w: Float[chex.Array, "*shape"], mask: Bool[chex.Array, "*shape"], lambda_w: Float[Array, ""]
) -> Float[chex.Array, "*shape"]:
    del mask, lambda_w
    return w


def _pull_pruned_forward(
    w: Float[chex.Array, "*shape"], mask: Bool[chex.Array, "*shape"], lambda_w: Float[Array, ""]
) -> tuple[chex.Array, _Residuals]:
    return w, (w, apply_mask(w, mask), lambda_w)


_pull_pruned.defvjp(_pull_pruned_forward, partial(_sparse_refined_backward, apply_mask))
