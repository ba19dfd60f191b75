"""Where a packed 2:4 weight has its values, as Hopper's sparse instruction reads it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nmjax.kernels.operands import inputs_of, kernel_taps, outputs_of
from nmjax.packed_nm import PackedNM
from nmjax.patterns import NM

# A block of threads computes 128 outputs, and a step of it reads 64 inputs.
OUTPUTS, INPUTS = 128, 64


def position_words(packed: PackedNM) -> jax.Array:
    """The words that say where the values were; the bytes of `packed.codes` in another order.

    A weight of 64 inputs by 64 outputs is two instructions, and a word in each of 128 threads.
    Thread t of warp t // 32, with row = t // 4 % 8 and part = t % 4, says of inputs 16 part to
    16 part + 15 where output 16 warp + row keeps them, in its lower half, and output
    16 warp + row + 8 in its upper half: 4 bits for each group of 4, the first value's place in the
    lower two. The first instruction reads threads with part 0 and 1, the second those with 2 and 3,
    which is what its sparsity selector says.

    Source: PTX ISA, section "Sparse wgmma.mma_async", metadata of 64xNx32 for .f16 and .bf16, as
    CUTLASS lays it out: `ELayout_64x32` (cute/atom/mma_traits_sm90_gmma_sparse.hpp) and
    `TensorEAtom_16bit` (cutlass/gemm/collective/builders/sm90_sparse_config.inl). The first has
    each word twice, in the threads of either selector; here a thread's word serves one of two
    instructions.

    Args:
      packed: a 2:4 matrix of bfloat16 or float16, inputs a multiple of 64, outputs of 128.

    Returns:
      uint32 (inputs / 64, outputs / 64, 128).

    Raises:
      ValueError: the weight is something else.
    """
    obstacle = why_not_packed(packed)
    if obstacle:
        raise ValueError(f"sparse wgmma cannot take {packed.dtype}{packed.shape}: {obstacle}")
    spans, tiles = inputs_of(packed) // 64, outputs_of(packed) // 64
    # (span, part, byte, tile, warp, half, row); a byte of the codes is of two groups of an output.
    codes = packed.codes.reshape(spans, 4, 2, tiles, 4, 2, 8)
    threads = codes.transpose(0, 3, 4, 6, 1, 5, 2).reshape(spans, tiles, 128, 4)
    return jax.lax.bitcast_convert_type(threads, jnp.uint32)


def why_not_packed(packed: PackedNM) -> str | None:
    """Why the instruction, as we use it, does not multiply by a packed leaf, or None."""
    pattern = packed.leaf_plan.pattern
    if not isinstance(packed, PackedNM) or pattern != NM(2, 4):
        return f"it multiplies 2:4 weights, not {pattern}"
    if kernel_taps(packed) or packed.values.ndim != 3:
        return "it takes one matrix; map over a stack of layers, and convolutions stay packed"
    if packed.dtype not in (jnp.bfloat16, jnp.float16):
        return "it takes bfloat16 or float16; cast the weight before it is packed"
    if inputs_of(packed) % INPUTS or outputs_of(packed) % OUTPUTS:
        return (
            f"it takes inputs in multiples of {INPUTS} and outputs in multiples of {OUTPUTS}; "
            "nmjax.packed_matmul takes any"
        )
    return None
