"""The forward pass of a linen module as a function of its parameters, to be traced from shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.core import Scope

from nmjax.packed.weight import is_packed
from nmjax.tracing.program import constant, described, explaining_shape_errors, is_array
from nmjax.trees.modules import wrong_module

# The collection that holds what earlier inputs left behind. Others, such as running statistics,
# masks, and scales of quantization, do not depend on the input: as inputs they would count as
# activations, and the products of nn.SpectralNorm with its statistics as products of the network.
_CACHE = "cache"


class ForwardPass(NamedTuple):
    """A forward pass, with shapes for everything that it takes.

    Attributes:
      run: `run(params, inputs)`; jitted, so that it is traced once for the same shapes.
      params: the shapes of the parameters.
      inputs: those of everything that depends on the input: the call's arrays, and the module's
        cache.
    """

    run: Callable[..., Any]
    params: Any
    inputs: list[jax.ShapeDtypeStruct]


def forward_pass(
    module: nn.Module, inputs: tuple[Any, ...], call: Mapping[str, Any]
) -> ForwardPass:
    """The forward pass of an unbound module, whose variables are those of its `init`.

    Args:
      module: a linen module.
      inputs: of its `__call__`: arrays, ShapeDtypeStructs, or shapes of float32 arrays.
      call: keyword arguments of its `__call__`, which stay as they are, and perhaps `method`.

    Raises:
      TypeError: `module` is not a linen module instance.
    """
    check_module(module)
    args = tuple(map(described, inputs))
    key = jax.random.key(0)
    arrays, rebuild = _split(args)
    with explaining_shape_errors(args):
        variables = jax.eval_shape(lambda x: module.init(key, *rebuild(x), **call), arrays)

    # Flax uses the "params" stream for random number streams that are missing (dropout).
    def apply(variables: Any, args: Any) -> Any:
        mutable = [name for name in variables if name != "params"]
        return module.apply(variables, *args, rngs={"params": key}, mutable=mutable, **call)

    return _of_variables(apply, variables, args)


def forward_pass_of_call(
    scope: Scope, dense: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ForwardPass:
    """What a method of an unbound module does in this call, with the variables of a scope."""
    rngs = {name: jax.random.key(0) for name in scope.rngs}

    def apply(variables: Any, given: Any) -> Any:
        args, kwargs = given
        settings: dict[str, Any] = {"rngs": rngs, "mutable": scope.mutable, "method": method}
        return dense.apply(variables, *args, **settings, **kwargs)

    return _of_variables(apply, dict(scope.variables()), (args, kwargs))


def unbound(module: nn.Module, module_class: type[nn.Module]) -> nn.Module:
    """A copy of a bound module, of another class with the same fields, that belongs to no scope."""
    # Fields that are modules are copied too. They keep their names, which their variables have.
    return module_class(**fields_of(module.clone(name=None, _deep_clone=True)), parent=None)


def check_module(module: Any, call: str = 'nmjax.linen.make_plan(module, "2:4", x)') -> None:
    """Raises TypeError unless it is a linen module instance; `call` is how to pass it."""
    if not isinstance(module, nn.Module):
        raise wrong_module("a linen module instance such as nn.Dense(4)", module, call)


def check_variables(variables: Any) -> None:
    """Raises TypeError if packed parameters are passed without their collection, "params"."""
    is_nested = isinstance(variables, Mapping) and "params" not in variables
    if is_packed(variables) or (
        is_nested and any(map(is_packed, jax.tree.leaves(variables, is_leaf=is_packed)))
    ):
        raise TypeError(
            'expected the variables of a module, got packed parameters; pass {"params": packed}'
        )


def fields_of(module: nn.Module) -> dict[str, Any]:
    """The arguments that a module of the same class is made from, without parent and name."""
    return {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.init and field.name not in ("parent", "name")
    }


def _of_variables(apply: Callable[..., Any], variables: Any, given: Any) -> ForwardPass:
    params = _shapes(variables.get("params"))
    constants = {n: _shapes(v) for n, v in variables.items() if n not in ("params", _CACHE)}
    cache = {n: v for n, v in variables.items() if n == _CACHE}
    arrays, rebuild = _split((cache, given))

    def run(params: Any, arrays: list[Any]) -> Any:
        cache, given = rebuild(arrays)
        others = jax.tree.map(constant, constants)
        results = jax.tree.leaves(apply({**others, **cache, "params": params}, given))
        # Results need not be arrays.
        return [result for result in results if isinstance(result, jax.Array)]

    return ForwardPass(jax.jit(run), params or {}, _shapes(arrays))


def _split(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a tree, and what puts others in their place. The rest is static."""
    leaves, structure = jax.tree.flatten(tree)

    def rebuild(arrays: list[Any]) -> Any:
        new = iter(arrays)
        mixed = [next(new) if is_array(leaf) else leaf for leaf in leaves]
        return jax.tree.unflatten(structure, mixed)

    return [leaf for leaf in leaves if is_array(leaf)], rebuild


def _shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf, tree
    )
