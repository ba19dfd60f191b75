"""Flax linen modules that train sparse inside an unchanged training loop."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import flax.errors
import flax.linen as nn
import jax
from jax.typing import ArrayLike

from nmjax import planning
from nmjax.layouts import Axes, layouts
from nmjax.linen.forward_pass import (
    ForwardPass,
    check_module,
    fields_of,
    forward_pass_of_call,
    is_array,
    unbound,
)
from nmjax.patterns import Pattern, parse_pattern
from nmjax.plans import Plan
from nmjax.pruning import planned_leaves
from nmjax.pruning import sparsify as sparsify_params
from nmjax.selection import by_rule
from nmjax.tracing.program import read_program

# A module that cannot be traced: its code needs the values of its input, or it reads parameters
# that belong to another module.
_UNTRACEABLE = (jax.errors.JAXTypeError, flax.errors.ScopeParamNotFoundError)


def sparsify(
    module: nn.Module,
    plan: str | Pattern | Plan,
    *,
    lambda_w: ArrayLike | None = None,
    **selection: Any,
) -> nn.Module:
    """Returns a module whose `apply` uses sparse parameters, with a straight-through gradient.

    The result has the same fields, public methods and variables as `module`: `init` returns the
    same tree with the same values, and `apply` takes it. So a training loop built on `init`,
    `apply` and `TrainState` trains sparse without changes, and checkpoints fit both modules.

    `init` runs the dense module; every `apply` is sparse. The first `apply` for inputs of the same
    shapes also traces the dense module, as `jax.jit` does, to read off its program along which axes
    it sums. For a pattern, these are the axes of the plan; a plan is checked against them. A module
    that cannot be traced gets the axes of known layers.

    Inside another module, create it in `setup`, where the attribute names it. In a compact method
    its name comes from its class (`SparseDense_0`), or from a module without a parent:
    `sparsify(nn.Dense(4, name="head", parent=None), "2:4")`.

    Args:
      module: any linen module. Submodules, collections, dropout, `nn.scan` and `nn.remat` inside
        it work as before.
      plan: a plan for the module's `params`, or a pattern such as `"2:4"`, for which a plan is
        made when the module runs, from what the called method does.
      lambda_w: None for STE; a number for SR-STE in the backward pass. If you control the
        optimizer, use `nmjax.add_sparse_refined` instead.
      **selection: keyword arguments of `nmjax.make_plan`, if `plan` is a pattern.

    Raises:
      TypeError: `module` is not a linen module instance; `selection` is passed with a plan;
        `nmjax.make_plan` does not take `selection`.
      ValueError: `apply` raises what `nmjax.make_plan`, `nmjax.check_axes` and `nmjax.sparsify`
        raise.

    >>> import jax.numpy as jnp
    >>> model = sparsify(nn.Dense(4), "1:4")
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8)))
    >>> output = model.apply(variables, jnp.eye(8))  # the sparse kernel, plus a bias of zeros
    >>> int((output != 0).sum()), variables["params"]["kernel"].size
    (8, 32)
    """
    check_module(module)
    if isinstance(plan, Plan) and selection:
        raise TypeError(
            f"{sorted(selection)} are arguments of nmjax.make_plan; pass them there, because this "
            "plan already exists"
        )
    # A misspelled argument fails here, not when the module first runs.
    inspect.signature(planning.make_plan).bind({}, plan, forward=None, inputs=(), **selection)
    plan_or_pattern = plan if isinstance(plan, Plan) else parse_pattern(plan)
    dense_class = type(module)

    def to_sparse(fitting: Plan | None, variables: Any) -> Any:
        params = variables.get("params")
        if not params:
            raise ValueError(
                f"{dense_class.__name__} has no parameters of its own to make sparse. If its "
                "submodules were created in another module's compact method, they belong to that "
                "module: create them in setup, or with parent=None"
            )
        if fitting is None:
            fitting = planning.make_plan(params, plan_or_pattern, **selection)
        return {**variables, "params": sparsify_params(params, fitting, lambda_w=lambda_w)}

    cache: dict[Hashable, Callable[..., Any]] = {}

    def sparse_method(name: str, self: nn.Module, args: Any, kwargs: Any) -> Callable[..., Any]:
        """The method that makes the parameters sparse, and then runs that of the dense class."""
        dense = unbound(self, dense_class)
        key = _key(dense, name, self.variables, args, kwargs)
        if key in cache:
            return cache[key]
        traced = forward_pass_of_call(self.scope, dense, name, args, kwargs)
        to_fit = partial(to_sparse, _plan_of_call(traced, plan_or_pattern, selection))
        # Inside a mapped method `self` is the dense class again, so methods that call other methods
        # sparsify the variables only once.
        mapped = nn.map_variables(dense_class, "params", trans_in_fn=to_fit, methods=[name])
        method: Callable[..., Any] = getattr(mapped, name)
        if key is not None:
            cache[key] = method
        return method

    overrides = {
        name: _dense_in_init(name, dense_class, sparse_method)
        for name in _public_methods(dense_class)
    }
    overrides["apply"] = _apply_by_name(dense_class)
    sparse_class = type(f"Sparse{dense_class.__name__}", (dense_class,), overrides)
    return sparse_class(**fields_of(module), name=module.name if module.parent is None else None)


def _plan_of_call(
    traced: ForwardPass, given: Plan | Pattern, selection: dict[str, Any]
) -> Plan | None:
    """The plan for a call of a method; None if the method cannot be traced or has no input.

    Args:
      traced: what the method does in this call.
      given: a plan, which is checked, or a pattern.
      selection: arguments of `nmjax.make_plan`, for a pattern.
    """
    run, params, inputs = traced
    plan = given if isinstance(given, Plan) else None
    if not params or not inputs:
        return plan
    if plan is not None:
        planned_leaves(params, plan)  # Raises if it does not fit.
    try:
        uses = read_program(run, params, inputs).uses
    except _UNTRACEABLE:
        return plan
    if plan is not None:
        planning.check_axes(plan, run, params, inputs)
        return plan
    # The call does not read the parameters of other methods, but rules may name them.
    known = layouts({name: use.shape for name, use in uses.items()})
    axes = {
        f"^{re.escape(name)}$": known[name]
        for name, use in uses.items()
        if not (use.is_used or use.lost_in or use.derived_from) and _is_certain(known[name])
    }
    chosen = {**selection, "axes": {**by_rule(selection.get("axes"), "axes"), **axes}}
    return planning.make_plan(params, given, forward=run, inputs=(inputs,), **chosen)


def _is_certain(axes: Any) -> bool:
    return isinstance(axes, Axes) and axes.taps is not None


def _key(dense: nn.Module, name: str, variables: Any, args: Any, kwargs: Any) -> Hashable | None:
    """What the plan of a call depends on; None if a part of it cannot be hashed."""
    leaves, structure = jax.tree.flatten((dict(variables), args, kwargs))
    described = [(x.shape, x.dtype) if is_array(x) else x for x in leaves]
    key = (dense, name, structure, *described)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _dense_in_init(
    name: str, dense_class: type[nn.Module], sparse_method: Callable[..., Any]
) -> Callable[..., Any]:
    """A method that runs dense while the module is being initialized, and sparse afterwards."""
    dense = getattr(dense_class, name)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.scope is None or self.is_initializing():
            return dense(self, *args, **kwargs)
        return sparse_method(name, self, args, kwargs)(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, dense.__doc__
    return method


def _apply_by_name(dense_class: type[nn.Module]) -> Callable[..., Any]:
    """An `apply` that takes `method=Network.encode` as the sparse `encode`, not the dense one."""

    def apply(self: nn.Module, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        # Flax would call the function that it is given, and that one belongs to the dense class.
        function = getattr(method, "__func__", method)
        name = getattr(function, "__name__", "")
        if function is not None and getattr(dense_class, name, None) is function:
            method = name
        return dense_class.apply(self, *args, method=method, **kwargs)

    apply.__doc__ = dense_class.apply.__doc__
    return nn.nowrap(apply)


def _public_methods(module_class: type[nn.Module]) -> list[str]:
    """`__call__`, and the public methods that a module class adds to `nn.Module`.

    Static methods, class methods and methods marked `nn.nowrap` do not read parameters.
    """
    return [
        name
        for name in dir(module_class)
        if (name == "__call__" or not (name.startswith("_") or hasattr(nn.Module, name)))
        # `getattr` would return a static method as an ordinary function.
        and inspect.isfunction(function := inspect.getattr_static(module_class, name))
        and not hasattr(function, "nowrap")
    ]
