"""Flax linen modules that train sparse inside an unchanged training loop."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.typing import ArrayLike

from nmjax.analysis.costs import Cost
from nmjax.analysis.costs import cost as cost_of_function
from nmjax.patterns import Pattern, parse_pattern
from nmjax.planning import make_plan
from nmjax.plans import Plan
from nmjax.pruning import sparsify as sparsify_params


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

    `init` runs the dense module; every `apply` is sparse.

    Inside another module, create it in `setup`, where the attribute names it. In a compact method
    its name comes from its class (`SparseDense_0`), or from a module without a parent:
    `sparsify(nn.Dense(4, name="head", parent=None), "2:4")`.

    Args:
      module: any linen module. Submodules, collections, dropout, `nn.scan` and `nn.remat` inside
        it work as before.
      plan: a plan for the module's `params`, or a pattern such as `"2:4"`, for which a plan is
        made when the module runs.
      lambda_w: None for STE; a number for SR-STE in the backward pass. If you control the
        optimizer, use `nmjax.add_sparse_refined` instead.
      **selection: keyword arguments of `nmjax.make_plan`, if `plan` is a pattern.

    Raises:
      TypeError: `module` is not a linen module instance; `selection` is passed with a plan;
        `nmjax.make_plan` does not take `selection`.
      ValueError: `apply` raises what `nmjax.make_plan` and `nmjax.sparsify` raise.

    >>> import jax.numpy as jnp
    >>> model = sparsify(nn.Dense(4), "1:4")
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8)))
    >>> output = model.apply(variables, jnp.eye(8))  # the sparse kernel, plus a bias of zeros
    >>> int((output != 0).sum()), variables["params"]["kernel"].size
    (8, 32)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a linen module instance such as nn.Dense(4), got {module!r}")
    if isinstance(plan, Plan) and selection:
        raise TypeError(
            f"{sorted(selection)} are arguments of nmjax.make_plan; pass them there, because this "
            "plan already exists"
        )
    # A misspelled argument fails here, not when the module first runs.
    inspect.signature(make_plan).bind({}, plan, **selection)
    plan_or_pattern = plan if isinstance(plan, Plan) else parse_pattern(plan)
    dense_class = type(module)
    methods = _public_methods(dense_class)

    def to_sparse(variables: Any) -> Any:
        params = variables.get("params")
        if not params:
            raise ValueError(
                f"{dense_class.__name__} has no parameters of its own to make sparse. If its "
                "submodules were created in another module's compact method, they belong to that "
                "module: create them in setup, or with parent=None"
            )
        fitting = plan_or_pattern
        if not isinstance(fitting, Plan):
            fitting = make_plan(params, fitting, **selection)
        return {**variables, "params": sparsify_params(params, fitting, lambda_w=lambda_w)}

    # Inside a mapped method `self` is the dense class again, so methods that call other methods
    # sparsify the variables only once.
    mapped_class = nn.map_variables(dense_class, "params", trans_in_fn=to_sparse, methods=methods)
    overrides = {name: _dense_in_init(name, dense_class, mapped_class) for name in methods}
    overrides["apply"] = _apply_by_name(dense_class)
    sparse_class = type(f"Sparse{dense_class.__name__}", (mapped_class,), overrides)
    fields = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.init and field.name not in ("parent", "name")
    }
    return sparse_class(**fields, name=module.name if module.parent is None else None)


def cost(module: nn.Module, plan: Plan | str | Pattern | None, *inputs: Any, **kwargs: Any) -> Cost:
    """Counts a module's weights and multiply-adds, layer by layer, without running it.

    Args:
      module: a linen module.
      plan: a plan for its `params`; a pattern, for a plan with the default rules; None for the
        dense network.
      *inputs: the module's inputs as arrays, ShapeDtypeStructs or shapes (of float32). For the
        cost of one example, use a batch size of 1.
      **kwargs: static arguments of the module's `__call__`, such as `train=True`.

    >>> print(cost(nn.Dense(4), "2:4", (1, 8)))
    leaf    pattern  weights  kept  multiply-adds  kept   share
    ------  -------  -------  ----  -------------  ----  ------
    bias    dense          4     4              0     0    0.0%
    kernel  2:4           32    16             32    16  100.0%
    total                 36    20             32    16  100.0%
    """
    inputs = tuple(
        jax.ShapeDtypeStruct(i, jax.numpy.float32) if _is_shape(i) else i for i in inputs
    )
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda *args: module.init(key, *args, **kwargs), *inputs)
    params = variables["params"]
    if plan is not None and not isinstance(plan, Plan):
        plan = make_plan(params, plan)

    def forward(params: Any, others: Any, *args: Any) -> Any:
        variables = {**others, "params": params}
        # Flax uses the "params" stream for random number streams that are missing (dropout).
        return module.apply(variables, *args, rngs={"params": key}, mutable=list(others), **kwargs)

    # Other collections are inputs, so that they count as activations and not as weights.
    others = {name: tree for name, tree in variables.items() if name != "params"}
    return cost_of_function(forward, params, others, *inputs, plan=plan)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(size, int) for size in x)


def _dense_in_init(
    name: str, dense_class: type[nn.Module], mapped_class: type[nn.Module]
) -> Callable[..., Any]:
    """A method that runs dense while the module is being initialized, and sparse afterwards."""
    dense, sparse = getattr(dense_class, name), getattr(mapped_class, name)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        runs_dense = self.scope is None or self.is_initializing()
        return (dense if runs_dense else sparse)(self, *args, **kwargs)

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
