"""Training programs compile long and run for a moment here, so they are compiled fast, not well."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _compile_fast(request):
    """Leaves XLA's optimizations out where a module is not marked as `optimized`."""
    is_optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not is_optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
