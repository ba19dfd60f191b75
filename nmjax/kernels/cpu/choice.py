"""Which implementation is fastest, and why: from the platform, the pattern and the batch.

Every threshold was measured against XLA's dense product (`experiments.benchmarks.packed`).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from nmjax.kernels.cpu.library import load_library
from nmjax.kernels.operands import Packed, inputs_of, kernel_taps, outputs_of, taps_of
from nmjax.packed.nm import PackedNM
from nmjax.patterns import NM

# Above these densities XLA's dense product is faster than the kernels.
BLOCK_DENSITY = 0.7
GROUP_DENSITY = 0.5

_FEW_ROWS = 8

# Density and speed-up over the faster of XLA's and PyTorch's dense product of the same dtype: 256
# rows, or an image of 14 x 14 and 1 x 1 or 3 x 3 taps, on one thread of an AVX-512 machine
# (experiments/benchmarks/results/packed-cpu.json).
_SPEEDUPS = {
    "blocks float32": ((0.05, 13.0), (0.1, 7.8), (0.125, 6.7), (0.25, 3.8), (0.5, 1.95)),
    "blocks bfloat16": ((0.05, 10.7), (0.1, 5.5), (0.25, 2.6)),
    "pixels float32": ((0.1, 5.2), (0.25, 3.0), (0.5, 1.9)),
    "taps float32": ((0.1, 7.7), (0.25, 3.6), (0.5, 1.9)),
    "groups float32": ((1 / 16, 5.4), (1 / 8, 3.4), (1 / 4, 2.1), (1 / 2, 1.1)),
}


class Choice(NamedTuple):
    """An implementation, and the reason for it in words."""

    name: Literal["ffi", "gather", "row by row", "dense"]
    reason: str


def choose(dtype: np.dtype, packed: Packed, batch: int) -> Choice:
    """The fastest way on CPUs; elsewhere the weight is unpacked.

    Args:
      dtype: of the input.
      packed: the weight.
      batch: rows of x, or output pixels of all images.
    """
    obstacle = why_not_ffi(dtype, packed)
    density = density_of(packed)
    if obstacle is None:
        limit = GROUP_DENSITY if isinstance(packed, PackedNM) else BLOCK_DENSITY
        if density <= limit:
            return Choice("ffi", f"{load_library().instruction_set}, {density:.1%} kept")
        return Choice("dense", f"{density:.1%} kept: above {limit:.0%} the dense product is faster")
    if isinstance(packed, PackedNM) or packed.row_pointers is not None or taps_of(packed):
        return Choice("dense", obstacle)
    if batch <= _FEW_ROWS and density <= 0.5:
        return Choice("gather", f"{obstacle}; {batch} rows")
    if density <= 0.1 or (packed.leaf_plan.pattern.n >= 64 and density <= 0.25):
        return Choice("row by row", f"{obstacle}; {density:.1%} kept")
    return Choice("dense", obstacle)


def expected_speedup(dtype: np.dtype, packed: Packed) -> float | None:
    """How much faster than the dense product to expect on a CPU with AVX-512, many rows at a time.

    Interpolated between densities that were measured. Few rows gain more, since the dense weight
    has to be read for them; `python -m nmjax bench` measures.

    Returns:
      A ratio; 1.0 where the dense product is taken; None where nobody has measured. Below the
      least density that was measured, the ratio measured there.
    """
    name = choose(dtype, packed, 256).name
    if name != "ffi":
        return 1.0 if name == "dense" else None
    measured = _SPEEDUPS.get(f"{_kind(packed)} {dtype}", ())
    density = density_of(packed)
    if dtype != packed.dtype or not measured or density > measured[-1][0]:
        return None
    densities, speedups = np.log(np.array(measured)).T
    return float(np.exp(np.interp(np.log(density), densities, speedups)))


def _kind(packed: Packed) -> str:
    if isinstance(packed, PackedNM):
        return "groups"
    taps = taps_of(packed)
    return "blocks" if not taps else "pixels" if math.prod(taps) == 1 else "taps"


def why_not_ffi(dtype: np.dtype, packed: Packed) -> str | None:
    """Why the compiled kernels do not take these operands, or None."""
    library = load_library()
    if library.instruction_set is None:
        return f"no compiled kernels: {library.reason}"
    if not library.is_fast:
        return "no AVX2 here"
    return why_unsupported(dtype, packed)


def why_unsupported(dtype: np.dtype, packed: Packed) -> str | None:
    """Why the compiled kernels cannot take these operands on any machine, or None."""
    dtypes = (jnp.float32, jnp.bfloat16)
    if dtype not in dtypes or packed.dtype not in dtypes:
        return f"kernels multiply float32 and bfloat16, not {dtype} by {packed.dtype}"
    pattern = packed.leaf_plan.pattern
    if isinstance(pattern, NM):
        if kernel_taps(packed):
            return "kernels multiply N:M matrices, not convolutions"
        if pattern.m > 32 or pattern.n == pattern.m:
            return f"kernels take groups of 2 to 32, not {pattern}"
        if outputs_of(packed) % 16:
            return f"kernels take a multiple of 16 outputs, not {outputs_of(packed)}"
        return None
    if pattern.n % 4:
        return f"kernels take blocks of a multiple of 4 outputs, not {pattern.n}"
    if len(taps_of(packed)) > 2:
        return "kernels take up to two spatial axes"
    return None


def density_of(packed: Packed) -> float:
    """Fraction of the weights that is stored."""
    dense = math.prod((*taps_of(packed), inputs_of(packed)))
    if isinstance(packed, PackedNM):
        return packed.leaf_plan.pattern.density
    n = packed.leaf_plan.pattern.n
    rows = (
        packed.indices.shape[-2]
        if packed.row_pointers is None
        else packed.row_pointers.shape[-1] - 1
    )
    return packed.values.size / max(dense * rows * n, 1)
