"""Products with packed weights: their definition, plain XLA, and compiled kernels."""

from nmjax.kernels.gpu.dense_layer import sparse_dense

__all__ = ["sparse_dense"]
