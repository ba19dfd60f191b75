"""The kernel of `sparse_wgmma`, in JAX's Mosaic GPU; importing it fails where JAX has changed.

A block of threads is three warpgroups. One copies what the next steps read into shared memory, the
others compute 64 outputs each of up to 256 rows. The structure is that of JAX's own dense product,
jax/experimental/pallas/ops/gpu/hopper_matmul_mgpu.py; it has no sparse instruction, so that one is
PTX in line.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import FragmentedArray, WGMMAAccumulator, memref_transpose
from jax.experimental.mosaic.gpu.fragmented_array import optimization_barrier
from jax.experimental.mosaic.gpu.mma_utils import create_descriptor
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from nmjax.kernels.position_words import INPUTS, OUTPUTS

ROWS = 256  # The most that an instruction takes; fewer would read the values more often.
STEPS = 4  # In shared memory at a time: 41 KB each, of Hopper's 227 KB.
SLAB = 64  # Rows that are stored at a time.
SWIZZLE = 128
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(SWIZZLE))
WGMMA = plgpu.Layout.WGMMA


def multiply(x: jax.Array, values: jax.Array, words: jax.Array) -> jax.Array:
    """X (batch, inputs), values (inputs / 2, outputs) and their words -> (batch, outputs)."""
    batch, outputs = x.shape[0], values.shape[1]
    rows = math.gcd(batch, ROWS)
    kernel = plgpu.kernel(
        functools.partial(_kernel, rows),
        out_type=jax.ShapeDtypeStruct((batch, outputs), x.dtype),
        grid=(outputs // OUTPUTS * (batch // rows),),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="nmjax_sparse_wgmma",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return kernel(x, values, words)


def _kernel(rows: int, x: Any, values: Any, words: Any, y: Any) -> None:
    """What each warpgroup does, given references to global memory."""
    blocks = (values.shape[1] // OUTPUTS, x.shape[0] // rows)
    # Blocks that run at the same time share what they read, in the second-level cache.
    to_outputs, to_rows = plgpu.planar_snake(lax.axis_index("block"), blocks, 1, 8)
    group = lax.axis_index("warpgroup")
    multiply_step = inlined(rows, x.dtype)

    def step(_: Any, x: Any, values: Any, words: Any, sums: jax.Array) -> Any:
        values = values.at[:, pl.ds(64 * group, 64)]
        return multiply_step(sums, x, values, words.at[0, group])

    def compute(over_inputs: Any, stored: Any) -> None:
        sums = over_inputs(plgpu.layout_cast(jnp.zeros((64, rows), jnp.float32), WGMMA))
        first_output = OUTPUTS * to_outputs + 64 * group
        slab = min(rows, SLAB)
        for first in range(0, rows, slab):
            part = sums[:, first : first + slab].astype(y.dtype)
            stored.at[group].T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            place = (pl.ds(rows * to_rows + first, slab), pl.ds(first_output, 64))
            plgpu.copy_smem_to_gmem(stored.at[group], y.at[place])
            plgpu.wait_smem_to_gmem(0)

    def run(stored: Any) -> None:
        over_inputs = plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(x.shape[1] // INPUTS,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec((rows, INPUTS), lambda k: (to_rows, k), transforms=TILED),
                plgpu.BlockSpec(
                    (INPUTS // 2, OUTPUTS), lambda k: (k, to_outputs), transforms=TILED
                ),
                plgpu.BlockSpec((1, OUTPUTS // 64, 128), lambda k: (k, to_outputs, 0)),
            ],
            wg_axis="warpgroup",
            num_compute_wgs=2,
            max_concurrent_steps=STEPS,
            compute_context=functools.partial(compute, stored=stored),
        )
        over_inputs(x, values, words)

    stored = plgpu.SMEM((2, min(rows, SLAB), 64), y.dtype, transforms=TILED)
    pl.run_scoped(run, stored, collective_axes="warpgroup")


def inlined(rows: int, dtype: np.dtype) -> Any:
    """One warpgroup's step: sums (64, rows), x, values and words in shared memory -> sums."""
    return plgpu.inline_mgpu(
        arg_types=(WGMMA, plgpu.RefType(TILED), plgpu.RefType(TILED), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((64, rows), jnp.float32, layout=WGMMA),
    )(functools.partial(_step, {"bfloat16": "bf16", "float16": "f16"}[str(dtype)]))


def _step(dtype: str, _: Any, sums: Any, x: Any, values: Any, words: Any) -> Any:
    """Two instructions, of 32 inputs each."""
    rows = sums.shape[1]
    accumulator = WGMMAAccumulator.from_registers(sums)
    (word,) = FragmentedArray.load_strided(words, is_signed=False, vec_size=1).registers.flat
    # The instruction's A is (outputs, inputs) and its B (inputs, rows): both are held transposed,
    # and in tiles.
    a, a_step = _descriptor(values, (64, INPUTS // 2), 32, is_b=False)
    b, b_step = _descriptor(x, (INPUTS, rows), 64, is_b=True)
    registers = accumulator._value.registers
    for half in range(2):
        operands = (_plus(a, half * a_step), _plus(b, half * b_step), _scalar(word))
        registers = _sparse_wgmma(registers, operands, half, rows, dtype)
    nvvm.wgmma_commit_group_sync_aligned()
    nvvm.wgmma_wait_group_sync_aligned(0)
    done = FragmentedArray(_registers=registers, _layout=accumulator._value.layout, _is_signed=None)
    # The compiler may not use the sums before the wait is over.
    return optimization_barrier(done).to_layout(sums.layout)


def _descriptor(ref: Any, size: tuple[int, int], width: int, *, is_b: bool) -> tuple[Any, int]:
    """Of an operand in shared memory, and what takes it `width` bytes of inputs further."""
    (descriptor, (_, steps)), _, _ = create_descriptor(
        memref_transpose(ref, (1, 0, 3, 2)),
        swizzle=SWIZZLE,
        group_size=size,
        logical_k_major=is_b,
        mma_bytewidth_k=width,
    )
    return descriptor, steps[0] >> 4  # Descriptors count 16 bytes.


def _sparse_wgmma(registers: Any, operands: Any, selector: int, rows: int, dtype: str) -> Any:
    """Sums, of registers of each thread, plus the product."""
    count = registers.size
    register = registers.flat[0].type
    sums = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    a, b, word = (f"${2 * count + i}" for i in range(3))
    # In order: sums, A, B, words, which threads' words, whether to add to the sums, the signs of A
    # and B, and whether they are transposed: A has outputs in neighbouring places, B inputs.
    instruction = (
        "{ .reg .pred add; setp.ne.b32 add, 1, 0; "
        f"wgmma.mma_async.sp.sync.aligned.m64n{rows}k32.f32.{dtype}.{dtype} "
        f"{sums}, {a}, {b}, {word}, {selector}, add, 1, 1, 1, 0; }}"
    )
    # The sums come in where they go out.
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["l", "l", "r"]
    result: Any = llvm.inline_asm(
        llvm.StructType.get_literal([register] * count),
        [*registers.flat, *operands],
        instruction,
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    parts = [llvm.extractvalue(register, result, [i]) for i in range(count)]
    return np.array(parts, dtype=object).reshape(registers.shape)


def _plus(descriptor: Any, offset: int) -> Any:
    constant = llvm.ConstantOp(descriptor.type, ir.IntegerAttr.get(descriptor.type, offset)).result
    return llvm.add(descriptor, constant, overflow_flags=llvm.IntegerOverflowFlags.none)


def _scalar(vector: Any) -> Any:
    index = ir.IntegerType.get_signless(32)
    zero = llvm.ConstantOp(index, ir.IntegerAttr.get(index, 0)).result
    return llvm.extractelement(vector, zero)
