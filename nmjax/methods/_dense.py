"""The dense baseline."""

from __future__ import annotations

from nmjax.methods.sparsifier import Sparsifier, stateless


def dense() -> Sparsifier:
    """Leaves the parameters unchanged, so that a dense baseline runs in the same training loop.

    >>> params = {"kernel": 1.0}
    >>> dense().apply(params, ()) is params
    True
    """
    return stateless(lambda params: params, lambda params: params)
