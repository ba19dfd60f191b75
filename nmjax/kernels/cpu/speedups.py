"""How much faster the compiled kernels for CPUs were measured to be."""

from __future__ import annotations

import numpy as np

from nmjax.packed.weight import Packed

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


def measured_speedup(work: str, dtype: np.dtype, packed: Packed) -> float | None:
    """Speed-up of the compiled kernels over the dense product on AVX-512, many rows at a time.

    Interpolated between measured densities; below the least of them, the value measured there.
    Few rows gain more, since the dense weight has to be read for them. `python -m nmjax bench`
    measures your own machine.

    Args:
      work: what the product does, as `compiled.work` names it.
      dtype: of the input.
      packed: one weight.

    Returns:
      A ratio; None where nothing was measured.
    """
    measured = _SPEEDUPS.get(f"{work} {dtype}", ())
    density = packed.density
    if dtype != packed.dtype or not measured or density > measured[-1][0]:
        return None
    densities, speedups = np.log(np.array(measured)).T
    return float(np.exp(np.interp(np.log(density), densities, speedups)))
