"""Flax linen modules that train sparse inside an unchanged training loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, cast

import flax.linen as nn
from flax.core import Scope
from jax.typing import ArrayLike

from nmjax import planning
from nmjax.linen.call_plans import call_key, check_call, plan_call
from nmjax.linen.forward_pass import check_module, fields_of, forward_pass_of_call, unbound
from nmjax.packed.weight import is_packed
from nmjax.patterns import Pattern, parse_pattern
from nmjax.plans import Plan
from nmjax.pruning import sparsify as sparsify_params
from nmjax.trees.leaves import named_leaves


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
    shapes also traces the dense module: a pattern takes the axes of its program, and a plan is
    checked against them. A module that cannot be traced takes the axes of known layers.

    Inside another module, create it in `setup`, where the attribute names it. In a compact method
    its name comes from its class (`SparseDense_0`), or from a module without a parent:
    `sparsify(nn.Dense(4, name="head", parent=None), "2:4")`.

    Args:
      module: any linen module. Submodules, collections, dropout, `nn.scan` and `nn.remat` inside
        it work as before.
      plan: a plan for the module's `params`, or a pattern such as `"2:4"`, for which a plan is
        made when the module runs, from what the called method does.
      lambda_w: None for STE; a number for SR-STE in the backward pass. If you control the
        optimizer, use `nmjax.add_sparse_refined` instead, which adds the term once: here each use
        of a shared module adds it, and it does not grow with a scaled loss.
      **selection: keyword arguments of `nmjax.make_plan`, if `plan` is a pattern.

    Raises:
      TypeError: `module` is not a linen module instance; `selection` is passed with a plan;
        `nmjax.make_plan` does not take `selection`.
      ValueError: `apply` raises what `nmjax.make_plan`, `nmjax.check_axes` and `nmjax.sparsify`
        raise.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> model = sparsify(nn.Dense(4), "1:4")
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8)))
    >>> output = model.apply(variables, jnp.eye(8))  # the sparse kernel, plus a bias of zeros
    >>> int((output != 0).sum()), variables["params"]["kernel"].size
    (8, 32)
    """
    check_module(module, 'nmjax.linen.sparsify(module, "2:4")')
    if isinstance(plan, Plan) and selection:
        raise TypeError(
            f"{sorted(selection)} are arguments of nmjax.make_plan; pass them there, because this "
            "plan already exists"
        )
    if given_twice := sorted({"forward", "inputs"} & selection.keys()):
        raise TypeError(f"{given_twice} are not needed here: each call traces the module")
    # A misspelled argument fails here, not when the module first runs.
    inspect.signature(planning.make_plan).bind({}, plan, forward=None, inputs=(), **selection)
    given = plan if isinstance(plan, Plan) else parse_pattern(plan)
    dense_class = type(module)
    sparse_method = _sparse_methods(dense_class, given, selection, lambda_w)
    overrides = {
        name: _dense_in_init(name, dense_class, sparse_method)
        for name in _public_methods(dense_class)
    }
    overrides["apply"] = _apply_by_name(dense_class)
    sparse_class = type(f"Sparse{dense_class.__name__}", (dense_class,), overrides)
    return sparse_class(**fields_of(module), name=module.name if module.parent is None else None)


def _sparse_methods(
    dense_class: type[nn.Module],
    given: Plan | Pattern,
    selection: dict[str, Any],
    lambda_w: ArrayLike | None,
) -> Callable[..., Callable[..., Any]]:
    """Returns a function that makes the sparse form of a method, for one call of it."""
    known: dict[Hashable, Callable[..., Any]] = {}

    def to_sparse(plan: Plan | None, variables: Any) -> Any:
        params = variables.get("params")
        if not params:
            raise ValueError(
                f"{dense_class.__name__} has no parameters of its own to make sparse. If its "
                "submodules were created in another module's compact method, they belong to that "
                "module: create them in setup, or with parent=None"
            )
        if plan is None:
            plan = planning.make_plan(params, cast(Pattern, given), **selection)
        return {**variables, "params": sparsify_params(params, plan, lambda_w=lambda_w)}

    def sparse_method(name: str, module: nn.Module, args: Any, kwargs: Any) -> Callable[..., Any]:
        _check_dense(dense_class, module.variables.get("params", {}))
        dense = unbound(module, dense_class)
        key = call_key(dense, name, module.variables, args, kwargs)
        if key in known:
            return known[key]
        call = forward_pass_of_call(cast(Scope, module.scope), dense, name, args, kwargs)
        if isinstance(given, Plan):
            check_call(given, call)
            plan: Plan | None = given
        else:
            plan = plan_call(given, selection, call)
        # Inside a mapped method `self` is the dense class again, so methods that call other methods
        # sparsify the variables only once.
        mapped_class = nn.map_variables(
            dense_class, "params", trans_in_fn=partial(to_sparse, plan), methods=[name]
        )
        method: Callable[..., Any] = getattr(mapped_class, name)
        if key is not None:
            known[key] = method
        return method

    return sparse_method


def _check_dense(dense_class: type[nn.Module], params: Any) -> None:
    packed = [n for n, leaf in named_leaves(params, is_leaf=is_packed).items() if is_packed(leaf)]
    if packed:
        raise TypeError(
            f"{', '.join(packed)}: a module that linen.sparsify made trains dense weights, but "
            f"these are packed; run packed_apply on the {dense_class.__name__} itself"
        )


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
