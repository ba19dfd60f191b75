"""Variables of NNX modules by name, and modules that share some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx


def named_variables(state: Any) -> dict[str, Any]:
    """The variables of a state by the name that plans use, such as `"layers/0/kernel"`."""
    return {_name(path): variable for path, variable in nnx.to_flat_state(state)}


def with_variables(model: Any, new: Mapping[str, Any], *, copy: bool = False) -> Any:
    """A module like `model` with some variables replaced.

    Args:
      model: an NNX module.
      new: name -> the variable in its place.
      copy: whether the other variables are copied. If not, both modules share them, so that an
        update through one module reaches the other.
    """
    graph, state = nnx.split(model)
    flat = [(path, new.get(_name(path), old)) for path, old in nnx.to_flat_state(state)]
    merged: Any = nnx.merge(graph, nnx.from_flat_state(flat), copy=copy)
    return merged


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
