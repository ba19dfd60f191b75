"""Checks of what users pass to products with packed weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.masks.scores import as_array
from nmjax.packed.weight import Packed, is_packed
from nmjax.ste import check_has_values


def check_product(packed: Any, activation: Any) -> None:
    """Rejects an operand that is not packed, changed arrays, and an unknown activation."""
    if not is_packed(packed):
        raise TypeError(
            "expected a packed weight, a leaf of what nmjax.pack returns, got "
            f"{type(packed).__name__}; the input comes first, as in packed_matmul(x, packed)"
        )
    packed.check_arrays()
    if packed.dtype == np.int8:
        raise ValueError(f"{packed} has values of int8 without scales; nmjax.quantize makes both")
    check_has_values(packed.values, "the packed weight")
    if activation not in (None, "relu"):
        raise ValueError(f'activation must be None or "relu", got {activation!r}')


def check_floating(x: jax.Array) -> None:
    """Rejects inputs of other dtypes than those that products take."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise TypeError(
            f"x must be floating, of at least 16 bits, got {x.dtype}{x.shape}; cast it first"
        )


def flat_bias(bias: jax.Array | None, packed: Packed) -> jax.Array | None:
    """The bias of the flattened outputs."""
    if bias is None:
        return None
    bias = as_array(bias, "biases")
    if jnp.shape(bias) != packed.output_shape:
        raise ValueError(
            f"bias has shape {jnp.shape(bias)}, expected {packed.output_shape}, the output axes "
            f"of the weight {packed.shape}"
        )
    return jnp.ravel(bias)
