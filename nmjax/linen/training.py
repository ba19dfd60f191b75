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
from nmjax.plans import Plan, make_plan
from nmjax.pruning import sparsify as sparsify_params


def sparsify(
    module: nn.Module,
    plan: str | Pattern | Plan,
    *,
    lambda_w: ArrayLike | None = None,
    **selection: Any,
) -> nn.Module:
    """Makes a module whose `apply` uses sparse parameters, with a straight-through gradient.

    The result has the fields' values, the public methods and the very same variables as `module`:
    `init` gives the same tree with the same values, and `apply` takes it. So a training loop
    built on `init`, `apply` and `TrainState` trains sparse unchanged, and checkpoints fit both.

    `init` itself runs dense. Outputs are sparse from the first `apply` on.

    As a part of another module it is best made in `setup`, where the attribute names it. A compact
    method names it by its class, `SparseDense_0`, or by the name of a module without a parent:
    `sparsify(nn.Dense(4, name="head", parent=None), "2:4")`.

    Args:
      module: any linen module; submodules, collections, dropout, `nn.scan` and `nn.remat` inside
        it work as before.
      plan: a plan made for the module's `params`, or a pattern such as `"2:4"`, from which the
        plan is made when the module runs.
      lambda_w: None for STE; a number for SR-STE in the backward pass, for loops whose optimizer
        is out of reach. Where it is not, `nmjax.add_sparse_refined` is the better place.
      **selection: where `plan` is a pattern, the keyword arguments of `nmjax.make_plan`.

    Raises:
      TypeError: `module` is not a linen module instance, `selection` comes with a plan, or it is
        not what `nmjax.make_plan` takes.
      ValueError: from `apply`, as `nmjax.make_plan` and `nmjax.sparsify`.

    >>> import jax.numpy as jnp
    >>> model = sparsify(nn.Dense(4), "1:4")
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8)))
    >>> output = model.apply(variables, jnp.eye(8))  # the kernel that it used, plus the bias
    >>> int((output != 0).sum()), variables["params"]["kernel"].size
    (8, 32)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a linen module instance such as nn.Dense(4), got {module!r}")
    if isinstance(plan, Plan) and selection:
        raise TypeError(
            f"{sorted(selection)} belong to nmjax.make_plan; pass them there, since this plan is "
            "made already"
        )
    inspect.signature(make_plan).bind({}, plan, **selection)
    plan_or_pattern = plan if isinstance(plan, Plan) else parse_pattern(plan)
    dense_class = type(module)
    methods = _public_methods(dense_class)

    def to_sparse(variables: Any) -> Any:
        params = variables.get("params")
        if not params:
            raise ValueError(
                f"{dense_class.__name__} has no parameters of its own to make sparse. If it was "
                "given modules that were made in a compact method, they belong to that method's "
                "module: make them in setup, or with parent=None"
            )
        fitting = plan_or_pattern
        if not isinstance(fitting, Plan):
            fitting = make_plan(params, fitting, **selection)
        return {**variables, "params": sparsify_params(params, fitting, lambda_w=lambda_w)}

    # Inside a mapped method `self` is dense again, so methods that call methods map only once.
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
    """Counts a module's weights and multiply-adds, layer by layer; nothing is run.

    Args:
      module: a linen module.
      plan: which leaves of its `params` are sparse; a pattern for all of them by the default
        rules; None for the dense network.
      *inputs: arrays, ShapeDtypeStructs or shapes (float32 is assumed), as `module` takes them.
        The batch size counts: use 1 for the cost of one example.
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
        # Flax draws from "params" where a stream of random numbers, as for dropout, is missing.
        return module.apply(variables, *args, rngs={"params": key}, mutable=list(others), **kwargs)

    others = {name: tree for name, tree in variables.items() if name != "params"}
    return cost_of_function(forward, params, others, *inputs, plan=plan)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(size, int) for size in x)


def _dense_in_init(
    name: str, dense_class: type[nn.Module], mapped_class: type[nn.Module]
) -> Callable[..., Any]:
    """A method that runs dense while the parameters are being made, and sparse from then on."""
    dense, sparse = getattr(dense_class, name), getattr(mapped_class, name)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        runs_dense = self.scope is None or self.is_initializing()
        return (dense if runs_dense else sparse)(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, dense.__doc__
    return method


def _apply_by_name(dense_class: type[nn.Module]) -> Callable[..., Any]:
    """`apply` for which `method=Network.encode` means the sparse `encode`, not the dense one."""

    def apply(self: nn.Module, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        function = getattr(method, "__func__", method)
        name = getattr(function, "__name__", "")
        if function is not None and getattr(dense_class, name, None) is function:
            method = name
        return dense_class.apply(self, *args, method=method, **kwargs)

    apply.__doc__ = dense_class.apply.__doc__
    return nn.nowrap(apply)


def _public_methods(module_class: type[nn.Module]) -> list[str]:
    """`__call__`, and the methods that a module class adds to those of every linen module.

    Static methods, class methods and those marked `nn.nowrap` do not read parameters.
    """
    return [
        name
        for name in dir(module_class)
        if (name == "__call__" or not (name.startswith("_") or hasattr(nn.Module, name)))
        and inspect.isfunction(function := inspect.getattr_static(module_class, name))
        and not hasattr(function, "nowrap")
    ]
