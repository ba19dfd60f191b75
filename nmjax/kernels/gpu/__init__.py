"""Products with 2:4 weights on NVIDIA GPUs."""
