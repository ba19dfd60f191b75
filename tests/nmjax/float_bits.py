"""Weights with every bit pattern, for tests of what must copy them exactly."""

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn"]


def bits_dtype(dtype):
    return np.dtype(f"uint{jnp.finfo(dtype).bits}")


def any_bits(rng, shape, dtype):
    """Every bit pattern: NaNs of any payload, infinities, denormals, -0.0."""
    width = jnp.finfo(dtype).bits
    bits = rng.integers(0, 2**width, shape, np.uint64).astype(bits_dtype(dtype))
    return jnp.asarray(without_refused(bits.view(jnp.dtype(dtype))))


def without_refused(values):
    """Puts ones in the place of NaN under `jax_debug_nans`, which refuses arrays with NaN."""
    values = np.asarray(values)
    if jax.config.jax_debug_nans:
        return np.where(np.isnan(values), np.ones_like(values), values)
    return values


def bits_of(x):
    """Floating point numbers as integers; others as they are."""
    x = np.asarray(x)
    return x.view(bits_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x
