"""Recognizes Flax modules by class, without importing Flax."""

from __future__ import annotations

from typing import Any


def check_no_module(params: Any) -> None:
    """Raises TypeError if `params` is a Flax module, naming the part of nmjax for modules.

    An NNX module is also a tree of arrays. But a mapped copy of it has statistics and random
    streams of its own, so that training would not reach those of the module. Equinox modules have
    no such state, so they pass.
    """
    name = type(params).__name__
    if _is_module_of("flax.linen", params):
        raise TypeError(
            f"{name} is a linen module, and this function takes a tree of parameters. For "
            'modules, use nmjax.linen: nmjax.linen.make_plan(module, "2:4", x), '
            "nmjax.linen.sparsify(module, plan); or pass its parameters, as in "
            'variables["params"]'
        )
    if _is_module_of("flax.nnx", params):
        raise TypeError(
            f"{name} is an NNX module, and this function takes a tree of parameters. "
            "For modules, use nmjax.nnx.make_plan, nmjax.nnx.sparsify, nmjax.nnx.prune and "
            "nmjax.nnx.pack; or pass nnx.state(model, nnx.Param)"
        )


def _is_module_of(package: str, node: Any) -> bool:
    return any(
        base.__name__ == "Module" and f"{base.__module__}.".startswith(f"{package}.")
        for base in type(node).__mro__
    )
