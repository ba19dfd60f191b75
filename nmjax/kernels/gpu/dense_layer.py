"""A dense layer that trains at 2:4: sparse products with the weight, forward and backward."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from nmjax.kernels.gpu import cusparselt
from nmjax.kernels.gpu.cusparselt_limits import check_batch, check_matrix
from nmjax.kernels.gpu.devices import check_gpu
from nmjax.masks.transposable import transposable_mask
from nmjax.ste import prune_ste

Way = Literal["xla", "cusparselt"]


def sparse_dense(
    x: jax.Array,
    w: jax.Array,
    mask: jax.Array | None = None,
    *,
    implementation: Literal["xla", "cusparselt"] | None = None,
) -> jax.Array:
    """Multiplies `x` by a weight that keeps 2 of every 4 along both axes.

    Forward `y = x @ s` with `s = w * mask`. Backward `dx = dy @ s.T` with the same `s`, which is
    2:4 along that product's sum too, and `dw = x.T @ dy` for every entry of `w`, straight through
    the mask. XLA multiplies densely by default. If asked, cuSPARSELt runs both products with `s` on
    the sparse tensor cores of NVIDIA GPUs; that has not been measured yet.

    Choosing a mask takes time, and 13 times the memory of a 16-bit weight, as XLA plans it for an
    H200. The paper below keeps a mask for 40 steps.

    Args:
      x: (..., inputs), real floating.
      w: (inputs, outputs), real floating, both sizes multiples of 4. The mask is chosen in its
        dtype, the products are computed in the dtype that `x` and `w` promote to.
      mask: booleans of `w`'s shape from `nmjax.transposable_mask`, now or some steps ago. By
        default each call computes that of `w`. With a mask that keeps more, cuSPARSELt's products
        are wrong.
      implementation: `"xla"`, the default, or `"cusparselt"`.

    Returns:
      (..., outputs).

    Raises:
      TypeError: `x` or `w` is not real floating, or `mask` not boolean.
      ValueError: shapes do not fit; `implementation` is unknown.
      NotImplementedError: the implementation asked for cannot take these operands.

    Source: Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024, whose
    weight gradient is sparse too; ours is dense.

    >>> w = jnp.array([[4.0, 3, 2, 1], [3, 4, 1, 2], [9, 9, 1, 1], [9, 9, 1, 1]])
    >>> sparse_dense(jnp.ones(4), w).tolist()
    [18.0, 18.0, 3.0, 3.0]
    >>> jax.grad(lambda w: sparse_dense(jnp.ones(4), w).sum())(w).min().item()
    1.0
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be real floating, got {x.dtype}{x.shape}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"w must be real floating, got {w.dtype}{w.shape}")
    if w.ndim != 2 or x.shape[-1:] != w.shape[:1]:
        raise ValueError(f"x {x.shape} and w {w.shape} should be (..., inputs), (inputs, outputs)")
    dtype = jnp.promote_types(x.dtype, w.dtype)
    # Straight through: the gradient of the sparse weight reaches every entry of w.
    sparse = prune_ste(w, transposable_mask(w) if mask is None else mask).astype(dtype)
    rows = x.reshape(-1, w.shape[0]).astype(dtype)
    y = _multiply(_way(rows, sparse, implementation), rows, sparse)
    return y.reshape(*x.shape[:-1], w.shape[1])


def _way(x: jax.Array, w: jax.Array, implementation: str | None) -> Way:
    if implementation in (None, "xla"):
        return "xla"
    if implementation != "cusparselt":
        raise ValueError(
            f'implementation must be None, "xla" or "cusparselt", got {implementation!r}'
        )
    try:
        cusparselt.check_library()
        check_matrix(x.dtype, w.shape, False)
        check_batch(x.dtype, x.shape[0])
        check_gpu()
    except NotImplementedError as reason:
        raise NotImplementedError(
            f'implementation="cusparselt" cannot multiply {x.shape} by {w.shape}: {reason}'
        ) from None
    return "cusparselt"


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(way: Way, x: jax.Array, w: jax.Array) -> jax.Array:
    return _product(way, x, w, transposed=False)


def _multiply_forward(
    way: Way, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _multiply(way, x, w), (x, w)


def _multiply_backward(
    way: Way, operands: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # The same 2:4 weight serves both products, since its mask is 2:4 along both axes. The weight's
    # gradient is dense: x and g are.
    x, w = operands
    return _product(way, g, w, transposed=True), jnp.matmul(x.T, g)


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _product(way: Way, x: jax.Array, w: jax.Array, *, transposed: bool) -> jax.Array:
    """`x @ w`, or `x @ w.T` if transposed."""
    if way == "xla":
        return jnp.matmul(x, w.T if transposed else w)
    # Unchecked: inside `jax.jit` the values of w are unknown, and the mask made it 2:4.
    return cusparselt.matmul(x, cusparselt.compress_unchecked(w, transposed))
