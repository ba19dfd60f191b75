"""Moves arrays from NumPy to JAX, which narrows 64-bit numbers unless `jax_enable_x64` is on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.tables import printable


def as_jax(name: str, array: np.ndarray) -> jax.Array:
    """Puts an array on the default device with the same numbers.

    64-bit integers become 32-bit ones if all of them fit: PyTorch's counters have 64 bits.

    Args:
      name: of the array, for messages.
      array: of NumPy.

    Raises:
      ValueError: JAX would change numbers.
    """
    narrow = jax.dtypes.canonicalize_dtype(array.dtype)
    if narrow != array.dtype:
        narrowed = array.astype(narrow) if array.dtype.kind in "iu" else None
        if narrowed is None or not np.array_equal(narrowed, array):
            raise ValueError(
                f"{printable(name)} contains {array.dtype} numbers, which JAX would narrow to "
                f'{narrow}; call jax.config.update("jax_enable_x64", True) first, or convert them'
            )
        array = narrowed
    return jnp.asarray(array)
