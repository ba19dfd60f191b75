"""Recognizes the modules of Flax, which are not parameters, without importing Flax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LINEN, _NNX = "flax.linen.", "flax.nnx."
# Package -> how errors call its modules, and the functions for them.
_MODULES = {
    _LINEN: (
        "linen",
        'Use nmjax.linen: nmjax.linen.make_plan(module, "2:4", x), '
        "nmjax.linen.sparsify(module, plan), nmjax.linen.packed_apply(module)",
    ),
    _NNX: (
        "NNX",
        'Use nmjax.nnx: nmjax.nnx.make_plan(model, "2:4", inputs=(x,)), '
        "nmjax.nnx.sparsify(model, plan), nmjax.nnx.pack(model, plan)",
    ),
}


def check_no_module(tree: Any) -> None:
    """Raises TypeError if `tree` is a Flax module; its edge of nmjax has the functions for it.

    An NNX module is also a tree of arrays. But a mapped copy of it has statistics and random
    streams of its own, so that training would not reach those of the module. Equinox modules have
    no such state, so they pass.
    """
    if _is_from(tree, _LINEN):
        raise TypeError(
            f"{wrong_module('parameters', tree)}. Or pass its parameters, such as "
            'variables["params"]'
        )
    if _is_from(tree, _NNX):
        raise TypeError(f"{wrong_module('parameters', tree)}. Or pass nnx.state(model, nnx.Param)")


def wrong_module(expected: str, given: Any, call: str = "") -> TypeError:
    """The error for something else than a function is for. It never prints weights.

    Args:
      expected: what the function is for.
      given: what it got. For a Flax module, the error names the functions that take it.
      call: how to call the function, such as "nmjax.nnx.prune(model, plan)".
    """
    if isinstance(given, type):
        got = f"the class {given.__name__}; pass an instance of it"
        return TypeError(f"expected {expected}, got {got}")
    name = type(given).__name__
    for package, (kind, way_out) in _MODULES.items():
        if _is_from(given, package):
            return TypeError(f"expected {expected}, got the {kind} module {name}. {way_out}")
    advice = f"; write {call}" if call else ""
    if call and isinstance(given, Mapping):
        advice += ', or for parameters nmjax.make_plan(params, "2:4")'
    return TypeError(f"expected {expected}, got {name}{advice}")


def is_quantized(module: Any) -> bool:
    """Whether qwix has replaced the products of a Flax module."""
    # qwix gives the modules that it quantizes a new class, with the old one as an attribute.
    return hasattr(type(module), "_unquantized_type")


def _is_from(tree: Any, package: str) -> bool:
    return any(
        base.__name__ == "Module" and base.__module__.startswith(package)
        for base in type(tree).__mro__
    )
