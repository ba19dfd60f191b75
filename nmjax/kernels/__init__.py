"""Products with packed weights: their definition, plain XLA, and compiled kernels."""
