"""Plain XLA for packed weights, where that beats unpacking them.

Which way is fastest was measured on CPUs: `experiments.benchmarks.packed`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.kernels.operands import Activation, outputs_of, result_dtype
from nmjax.kernels.reference import finish, sum_dtype
from nmjax.packed.blocks import PackedBlocks


def gather_matmul(
    x: jax.Array,
    packed: PackedBlocks,
    bias: jax.Array | None = None,
    activation: Activation = None,
) -> jax.Array:
    """Gathers the inputs of every row of uniform blocks, then one product: for small batches."""
    dtype = result_dtype(x, packed)
    inputs = jnp.take(x, packed.indices.astype(jnp.int32), axis=1, mode="clip")
    y = jnp.einsum("brk,rkn->brn", inputs, packed.values, preferred_element_type=sum_dtype(dtype))
    return finish(y.reshape(x.shape[0], outputs_of(packed)), bias, activation, dtype)


def row_by_row_matmul(
    x: jax.Array,
    packed: PackedBlocks,
    bias: jax.Array | None = None,
    activation: Activation = None,
) -> jax.Array:
    """One product for each row of uniform blocks, in turn: for few blocks and large batches."""
    dtype = result_dtype(x, packed)
    features = x.T

    def row(indices_and_values: tuple[jax.Array, jax.Array]) -> jax.Array:
        indices, values = indices_and_values
        inputs = jnp.take(features, indices.astype(jnp.int32), axis=0, mode="clip")
        return jnp.matmul(inputs.T, values, preferred_element_type=sum_dtype(dtype))

    rows = lax.map(row, (packed.indices, packed.values))  # (rows, batch, n)
    y = rows.swapaxes(0, 1).reshape(x.shape[0], outputs_of(packed))
    return finish(y, bias, activation, dtype)
