"""Plain XLA for uniform blocks, where that is faster than unpacking them.

The thresholds were measured on CPUs: `experiments.benchmarks.packed`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.kernels.operands import Activation
from nmjax.kernels.reference import finish, sum_dtype
from nmjax.packed.blocks import PackedBlocks
from nmjax.packed.weight import Packed

_FEW_ROWS = 8


def check(dtype: np.dtype, packed: Packed, rows: int) -> None:
    """Raises NotImplementedError unless the weight is a matrix with uniform rows of blocks."""
    del dtype, rows
    is_uniform = type(packed) is PackedBlocks and packed.pattern.uniform
    if not is_uniform or packed.taps:
        raise NotImplementedError("it multiplies matrices with uniform rows of blocks")


def gather_matmul(
    x: jax.Array,
    packed: PackedBlocks,
    bias: jax.Array | None = None,
    activation: Activation = None,
) -> jax.Array:
    """Gathers the inputs of every row of blocks, then multiplies once: for small batches."""
    dtype = packed.result_dtype(x)
    inputs = jnp.take(x, packed.indices.astype(jnp.int32), axis=1, mode="clip")
    # Some CPUs have no batched product of bfloat16 that sums in float32.
    inputs, values = (a.astype(sum_dtype(dtype)) for a in (inputs, packed.values))
    y = jnp.einsum("brk,rkn->brn", inputs, values)
    return finish(y.reshape(x.shape[0], packed.outputs), bias, activation, dtype)


def check_gather_pays(packed: Packed, rows: int) -> str:
    """Says why gathering is faster than the dense product; raises NotImplementedError if not."""
    if rows > _FEW_ROWS or packed.density > 0.5:
        raise NotImplementedError(f"{rows} rows, {packed.density:.1%} kept: too much to gather")
    return f"{rows} rows"


def row_by_row_matmul(
    x: jax.Array,
    packed: PackedBlocks,
    bias: jax.Array | None = None,
    activation: Activation = None,
) -> jax.Array:
    """Multiplies by one row of blocks at a time: for few blocks and large batches."""
    dtype = packed.result_dtype(x)
    features = x.T

    def row(indices_and_values: tuple[jax.Array, jax.Array]) -> jax.Array:
        indices, values = indices_and_values
        inputs = jnp.take(features, indices.astype(jnp.int32), axis=0, mode="clip")
        return jnp.matmul(inputs.T, values, preferred_element_type=sum_dtype(dtype))

    rows = lax.map(row, (packed.indices, packed.values))  # (rows, batch, n)
    y = rows.swapaxes(0, 1).reshape(x.shape[0], packed.outputs)
    return finish(y, bias, activation, dtype)


def check_row_by_row_pays(packed: Packed, rows: int) -> str:
    """Says why row by row is faster than the dense product; raises NotImplementedError if not."""
    del rows
    n, density = packed.values.shape[-1], packed.density
    # Wide blocks make products that are large enough to run well at higher densities.
    if density > 0.1 and not (n >= 64 and density <= 0.25):
        raise NotImplementedError(f"{density:.1%} kept: too many blocks")
    return f"{density:.1%} kept"
