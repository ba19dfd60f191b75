"""Flax linen modules that train sparse inside an unchanged training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.typing import ArrayLike

from nmjax.cost import Cost
from nmjax.cost import cost as cost_of_function
from nmjax.patterns import Pattern, parse_pattern
from nmjax.plans import Plan, make_plan
from nmjax.sparsify import sparsify as sparsify_params


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

    Args:
      module: any linen module; submodules, collections, dropout, `nn.scan` and `nn.remat` inside
        it work as before.
      plan: a plan made for the module's `params`, or a pattern such as `"2:4"`, from which the
        plan is made when the module runs.
      lambda_w: None for STE; a number for SR-STE in the backward pass, for loops whose optimizer
        is out of reach. Where it is not, `nmjax.add_sparse_refined` is the better place.
      **selection: where `plan` is a pattern, the keyword arguments of `nmjax.make_plan`.

    Raises:
      TypeError: `module` is not a linen module instance, or `selection` comes with a plan.
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
    pattern_or_plan = plan if isinstance(plan, Plan) else parse_pattern(plan)
    methods = {name: _forward(name) for name in ("__call__", *_public_methods(type(module)))}
    sparse_class = type(f"Sparse{type(module).__name__}", (_SparseModule,), methods)
    return sparse_class(
        dense=module.clone(parent=None, name=None),
        plan=pattern_or_plan,
        lambda_w=lambda_w,
        selection=tuple(selection.items()),
    )


def cost(module: nn.Module, plan: Plan | str | Pattern | None, *inputs: Any, **kwargs: Any) -> Cost:
    """Counts a module's weights and multiply-adds, layer by layer; nothing is run.

    Args:
      module: a linen module.
      plan: which leaves of its `params` are sparse; a pattern for all of them by the default
        rules; None for the dense network.
      *inputs: arrays, ShapeDtypeStructs or shapes (float32 is assumed), as `module` takes them.
        The batch size counts: use 1 for the cost of one example.
      **kwargs: static arguments of the module's `__call__`, such as `train=False`.

    >>> print(cost(nn.Dense(4), "2:4", (1, 8)))
    leaf    pattern  weights  kept  multiply-adds  kept   share
    ------  -------  -------  ----  -------------  ----  ------
    bias    dense          4     4              0     0    0.0%
    kernel  2:4           32    16             32    16  100.0%
    total                 36    20             32    16  100.0%
    """
    inputs = tuple(
        jax.ShapeDtypeStruct(i, jax.numpy.float32) if isinstance(i, tuple) else i for i in inputs
    )
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda *args: module.init(key, *args, **kwargs), *inputs)
    params = variables["params"]
    if plan is not None and not isinstance(plan, Plan):
        plan = make_plan(params, plan)

    def forward(params: Any, others: Any, *args: Any) -> Any:
        return module.apply({**others, "params": params}, *args, rngs={"dropout": key}, **kwargs)

    others = {name: tree for name, tree in variables.items() if name != "params"}
    return cost_of_function(forward, params, others, *inputs, plan=plan)


class _SparseModule(nn.Module):
    """Runs `dense` in its own scope on sparse parameters."""

    dense: nn.Module
    plan: Plan | Pattern
    lambda_w: ArrayLike | None
    selection: tuple[tuple[str, Any], ...]

    def setup(self) -> None:
        nn.share_scope(self, self.dense)

    def _sparse_variables(self, variables: Any) -> Any:
        params = variables["params"]
        plan = self.plan
        if not isinstance(plan, Plan):
            plan = make_plan(params, plan, **dict(self.selection))
        return {**variables, "params": sparsify_params(params, plan, lambda_w=self.lambda_w)}


def _forward(method: str) -> Callable[..., Any]:
    """A method that calls the dense module's on sparse parameters."""

    def forward(self: _SparseModule, *args: Any, **kwargs: Any) -> Any:
        def call(dense: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(dense, method)(*args, **kwargs)

        if self.is_initializing():
            return call(self.dense, *args, **kwargs)
        run = nn.map_variables(call, "params", trans_in_fn=self._sparse_variables)
        return run(self.dense, *args, **kwargs)

    forward.__name__ = method
    return forward


def _public_methods(module_class: type[nn.Module]) -> Sequence[str]:
    """The methods that a module class adds to those of every linen module."""
    fields = {field.name for field in dataclasses.fields(module_class)}
    return [
        name
        for name in dir(module_class)
        if not name.startswith("_")
        and name not in fields
        and not hasattr(nn.Module, name)
        and callable(getattr(module_class, name))
    ]
