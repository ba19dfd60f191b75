"""Recognizes the modules of Flax, which are not parameters, without importing Flax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_no_module(tree: Any) -> None:
    """Raises TypeError if `tree` is a Flax module; its edge of nmjax has the functions for it.

    An NNX module is also a tree of arrays. But a mapped copy of it has statistics and random
    streams of its own, so that training would not reach those of the module. Equinox modules have
    no such state, so they pass.
    """
    name = type(tree).__name__
    if _is_from(tree, "flax.linen."):
        raise TypeError(
            f"expected parameters, got the linen module {name}. Pass its parameters, such as "
            'variables["params"], or use nmjax.linen: nmjax.linen.make_plan(module, "2:4", x), '
            "nmjax.linen.sparsify(module, plan)"
        )
    if _is_from(tree, "flax.nnx."):
        raise TypeError(
            f"expected parameters, got the NNX module {name}. Use nmjax.nnx: "
            'nmjax.nnx.make_plan(model, "2:4", inputs=(x,)), nmjax.nnx.sparsify(model, plan). Or '
            "pass nnx.state(model, nnx.Param)"
        )


def got_no_module(given: Any, call: str) -> str:
    """What was given in place of a Flax module, and what to do; never prints weights.

    Args:
      given: anything but an instance of the wanted module class.
      call: the right call, such as "nmjax.nnx.prune(model, plan)".
    """
    name = type(given).__name__
    if isinstance(given, type):
        return f"got the class {given.__name__}; pass an instance of it"
    if _is_from(given, "flax.linen."):
        return (
            f'got the linen module {name}; use nmjax.linen: nmjax.linen.make_plan(module, "2:4", x)'
        )
    if _is_from(given, "flax.nnx."):
        return (
            f"got the NNX module {name}; use nmjax.nnx: "
            'nmjax.nnx.make_plan(model, "2:4", inputs=(x,))'
        )
    advice = f"got {name}; write {call}"
    if isinstance(given, Mapping):
        return f'{advice}, or for parameters nmjax.make_plan(params, "2:4")'
    return advice


def _is_from(tree: Any, package: str) -> bool:
    return any(
        base.__name__ == "Module" and base.__module__.startswith(package)
        for base in type(tree).__mro__
    )
