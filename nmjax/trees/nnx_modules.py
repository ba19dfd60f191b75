"""Recognizes Flax NNX modules by class, without importing Flax."""

from __future__ import annotations

from typing import Any


def check_not_nnx(params: Any) -> None:
    """Raises TypeError if `params` is an NNX module.

    A module is also a tree of arrays. But a mapped copy of it has statistics and random streams of
    its own, so that training would not reach those of the module.
    """
    if not any(
        base.__name__ == "Module" and f"{base.__module__}.".startswith("flax.nnx.")
        for base in type(params).__mro__
    ):
        return
    raise TypeError(
        f"{type(params).__name__} is an NNX module, and this function takes a tree of parameters. "
        "For modules, use nmjax.nnx.make_plan, nmjax.nnx.sparsify, nmjax.nnx.prune and "
        "nmjax.nnx.pack; or pass nnx.state(model, nnx.Param)"
    )
