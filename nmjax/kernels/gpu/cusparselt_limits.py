"""What cuSPARSELt takes, and the memory that it needs, without asking a library or a GPU.

Sources: NVIDIA's documentation (docs.nvidia.com/cuda/cusparselt), its sample matmul_advanced
(NVIDIA/CUDALibrarySamples), and, where they say nothing, what version 0.10.0 answered on an L4, an
L40S and an RTX PRO 6000, as recorded in pantheongpu/pantheonsim, nvidia/tests/data/lowprec. Hopper
is in none of these records.
"""

from __future__ import annotations

import math

import numpy as np

# What cuSPARSELt multiplies, and the dtypes of the product; the first is the default.
RESULTS: dict[str, tuple[str, ...]] = {
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
    "int8": ("int32", "float16", "bfloat16", "int8"),
    "float8_e4m3fn": ("bfloat16", "float16", "float32"),
}
# Which products can include GELU: by the documentation only int8, by the records float8 too.
GELU = {"int8": ("int8",), "float8_e4m3fn": ("bfloat16",)}


def bias_dtype(dtype: str, result: str) -> str:
    """Dtype of the bias for operands and a result of these dtypes."""
    return "float32" if dtype == "int8" else result


def compressed_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes for a compressed matrix: half of its values, codes of their positions, and spare room.

    cuSPARSELt reports the exact size only on a GPU, but programs are also compiled on machines
    without one. A matrix that needs more raises an error when it is compressed.
    """
    weights = _rounded_up(shape)
    # A group of 4 has a code of 4 bits; in the records, twice as much if its values are bytes.
    return weights // 2 * dtype.itemsize + weights // (4 * dtype.itemsize) + 4096


def compressing_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of scratch memory for compressing a matrix."""
    # The records have an eighth of a byte for each weight.
    return _rounded_up(shape) // 8 + 2**20


def multiplying_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of scratch memory for a product that is not tuned."""
    # The records have an eighth of a byte for each weight; the rest is for partial sums.
    return _rounded_up(shape) // 8 + 2**25


def searching_bytes(shape: tuple[int, ...], rows: int, outputs: int) -> int:
    """Bytes of scratch memory for a search, which tries split sums: one part's sums more."""
    return multiplying_bytes(shape) + 4 * rows * outputs


def _rounded_up(shape: tuple[int, ...]) -> int:
    return math.prod(math.ceil(size / 256) * 256 for size in shape)


def check_matrix(dtype: np.dtype, shape: tuple[int, ...], transposed: bool) -> None:
    """Raises NotImplementedError for a matrix that cuSPARSELt does not take."""
    dtype = np.dtype(dtype)
    if str(dtype) not in RESULTS:
        raise NotImplementedError(f"it takes {', '.join(RESULTS)}")
    if len(shape) != 2:
        raise NotImplementedError("it takes one matrix")
    step = 32 // min(dtype.itemsize, 2)
    if any(size % step for size in shape):
        raise NotImplementedError(f"it takes sizes that are multiples of {step}")
    if dtype.itemsize == 1 and not transposed:
        raise NotImplementedError(
            "it takes matrices of one-byte numbers only as (outputs, inputs): transposed=True"
        )


def batch_step(dtype: np.dtype) -> int:
    """What the rows of an input of a dtype must be a multiple of."""
    return 16 // min(np.dtype(dtype).itemsize, 2)


def check_batch(dtype: np.dtype, batch: int) -> None:
    """Raises NotImplementedError for a number of rows that cuSPARSELt does not take."""
    step = batch_step(dtype)
    if batch % step:
        raise NotImplementedError(f"the batch must be a multiple of {step}, not {batch}; pad it")


def check_result(dtype: np.dtype, result: np.dtype, activation: str | None) -> None:
    """Raises for a result that operands of a dtype cannot have.

    Raises:
      NotImplementedError: cuSPARSELt does not compute it.
      ValueError: an unknown activation.
    """
    allowed = RESULTS[str(dtype)]
    if str(result) not in allowed:
        raise NotImplementedError(f"results can be {', '.join(allowed)}, not {result}")
    if activation not in (None, "relu", "gelu"):
        raise ValueError(f'activation must be None, "relu" or "gelu", got {activation!r}')
    if activation == "gelu" and str(result) not in GELU.get(str(dtype), ()):
        pairs = " and ".join(f"{given} with {names[0]} results" for given, names in GELU.items())
        raise NotImplementedError(
            f"it computes GELU of {pairs} only; apply jax.nn.gelu to the product"
        )
