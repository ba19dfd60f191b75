"""2:4 products by Hopper's own sparse instruction, `wgmma.mma_async.sp`: not yet run on a GPU.

Experimental, and nothing chooses it: `packed_matmul` does not. Where it runs it is to be checked
first, by `python -m experiments.benchmarks.gpu --only "sparse wgmma"`.

The instruction multiplies by a 2:4 matrix from the left, so y.T = W.T @ x.T. It takes the values as
they are packed, and beside them the words of `position_words`.
"""

from __future__ import annotations

import jax
import numpy as np

from nmjax.kernels.ffi import batched
from nmjax.kernels.gpu import why_no_wgmma
from nmjax.kernels.operands import inputs_of, outputs_of
from nmjax.kernels.position_words import position_words, why_not_packed
from nmjax.packed_nm import PackedNM


def matmul(x: jax.Array, packed: PackedNM, words: jax.Array | None = None) -> jax.Array:
    """X (batch, inputs) times the weight, (batch, outputs), of x's dtype; sums are in float32.

    Not yet run on a GPU: it compiles for Hopper, and all but the instruction itself was run on a
    CPU. No gradient.

    Args:
      x: of the weight's dtype, bfloat16 or float16; the batch a multiple of 8, better of 256.
      packed: a 2:4 matrix, inputs a multiple of 64 and outputs of 128.
      words: what `position_words` makes of the weight, for more than one product; None makes them.

    Raises:
      ValueError: the weight is not a 2:4 matrix; a dtype or a shape that the kernel does not take;
        the device has no such instruction, or this version of JAX not what the kernel is made of.
    """
    obstacle = _why_not_product(x, packed, words) or _why_not_here(x, packed.values)
    if obstacle:
        raise ValueError(
            f"sparse wgmma cannot multiply {x.dtype}{x.shape} by {packed.dtype}{packed.shape}: "
            f"{obstacle}"
        )
    words = position_words(packed) if words is None else words
    values = packed.values.reshape(-1, outputs_of(packed))
    return batched(_call, x, (values, words), None)


def why_no_kernel() -> str | None:
    """Why this version of JAX cannot make the kernel, or None."""
    try:
        from nmjax.kernels import sparse_wgmma_kernel  # noqa: F401  # A second, and may fail.
    except (ImportError, AttributeError) as error:
        return f"JAX {jax.__version__} lacks part of Mosaic GPU ({error}); 0.10 to 0.12 have it"
    return None


def _call(x: jax.Array, weight: tuple[jax.Array, jax.Array], _: None) -> jax.Array:
    from nmjax.kernels.sparse_wgmma_kernel import multiply

    return multiply(x, *weight)


def _why_not_product(x: jax.Array, packed: PackedNM, words: jax.Array | None) -> str | None:
    obstacle = why_not_packed(packed)
    if obstacle:
        return obstacle
    if x.dtype != packed.dtype:
        return "both must have the same dtype"
    inputs, outputs = inputs_of(packed), outputs_of(packed)
    if x.ndim != 2 or x.shape[1] != inputs:
        return f"x should be (batch, {inputs})"
    if x.shape[0] % 8 or not x.shape[0]:
        return f"the batch must be a multiple of 8, not {x.shape[0]}; pad it"
    shape = (inputs // 64, outputs // 64, 128)
    if words is not None and (words.shape != shape or words.dtype != np.uint32):
        return f"words are {words.dtype}{words.shape}, expected uint32{shape} of position_words"
    return None


def _why_not_here(*operands: jax.Array) -> str | None:
    if any(isinstance(operand, jax.core.Tracer) for operand in operands):
        return why_no_kernel()  # Traced for any device; JAX says so where it cannot run this.
    return why_no_wgmma() or why_no_kernel()
