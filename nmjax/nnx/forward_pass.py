"""The forward pass of an NNX module as a function of its parameters, to be traced from shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from nmjax.tracing.program import constant, described
from nmjax.trees.modules import wrong_module


class ForwardPass(NamedTuple):
    """A forward pass, and everything that it takes.

    Attributes:
      run: `run(params, *inputs)`.
      params: the module's parameters.
      inputs: everything that depends on the input: the module's caches and random streams, and the
        arguments of its call.
    """

    run: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]


def forward_pass(model: Any, inputs: Sequence[Any], call: Mapping[str, Any]) -> ForwardPass:
    """The forward pass of a module, which stays as it is.

    Args:
      model: an NNX module, or its shapes.
      inputs: of its `__call__`: arrays, ShapeDtypeStructs, or shapes of float32 arrays.
      call: keyword arguments of its `__call__`, which stay as they are.

    Raises:
      TypeError: `model` is not an NNX module.
    """
    check_module(model)
    # Caches hold what earlier inputs left behind. Other states, such as running statistics and
    # masks, do not depend on the input: as inputs they would count as activations.
    parts: Any = nnx.split(model, nnx.Param, (nnx.Cache, nnx.RngState), ...)
    graph, params, cache, rest = parts

    def run(params: Any, cache: Any, *inputs: Any) -> Any:
        return nnx.merge(graph, params, cache, jax.tree.map(constant, rest))(*inputs, **call)

    return ForwardPass(run, params, (cache, *map(described, inputs)))


def check_module(model: Any, call: str = 'nmjax.nnx.make_plan(model, "2:4", inputs=(x,))') -> None:
    """Raises TypeError unless it is an NNX module; `call` is how to pass it."""
    if not isinstance(model, nnx.Module):
        raise wrong_module("an NNX module", model, call)
