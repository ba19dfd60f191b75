"""nmjax: N:M structured sparsity from scratch in JAX."""
