"""Products with packed weights: the definition in plain XLA, and faster kernels that match it."""

from nmjax.kernels.gpu.dense_layer import sparse_dense

__all__ = ["sparse_dense"]
