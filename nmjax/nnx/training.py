"""Sparse training of NNX modules."""

from __future__ import annotations

from typing import Any, TypeVar

from flax import nnx
from jax.typing import ArrayLike

from nmjax import pruning
from nmjax.nnx.forward_pass import check_module
from nmjax.nnx.variables import named_variables, with_variables
from nmjax.plans import Plan
from nmjax.pruning import Masks

Model = TypeVar("Model", bound=nnx.Module)


def sparsify(
    model: Model, plan: Plan, masks: Masks | None = None, *, lambda_w: ArrayLike | None = None
) -> Model:
    """Returns a module that computes with sparse parameters, with a straight-through gradient.

    Call it inside the function that you differentiate. The gradients reach the parameters of
    `model`, pruned weights included. All other variables are those of `model` itself: what a call
    does to batch statistics, random streams and caches happens to `model` too. Variables that a
    call creates, such as those of `sow`, belong to the returned module alone.

    Args:
      model: an NNX module.
      plan: from `nmjax.nnx.make_plan`.
      masks: leaf name -> boolean array; computed from the parameters by default.
      lambda_w: None for STE; a number for SR-STE in the backward pass. If you control the
        optimizer, use `nmjax.add_sparse_refined` instead.

    Raises:
      TypeError: `model` is not an NNX module.
      ValueError: what `nmjax.sparsify` raises.

    >>> import jax.numpy as jnp
    >>> from nmjax.nnx.plans import make_plan
    >>> model, x = nnx.Linear(8, 4, use_bias=False, rngs=nnx.Rngs(0)), jnp.eye(8)
    >>> plan = make_plan(model, "1:4", inputs=(x,))
    >>> def loss_fn(model):
    ...     return sparsify(model, plan)(x).sum()
    >>> grads = nnx.grad(loss_fn)(model)
    >>> int((sparsify(model, plan)(x) != 0).sum()), int((grads["kernel"][...] != 0).sum())
    (8, 32)
    """
    check_module(model, "nmjax.nnx.sparsify(model, plan)")
    params = nnx.state(model, nnx.Param)
    return _with_planned(model, pruning.sparsify(params, plan, masks, lambda_w=lambda_w), plan)


def with_params(model: Model, params: Any) -> Model:
    """Returns a module that computes with other parameters and shares all other variables.

    This is how a method of `nmjax.methods` trains an NNX module: its functions take
    `nnx.state(model, nnx.Param)`, and the loss uses
    `with_params(model, sparsifier.apply(nnx.state(model, nnx.Param), state))`.

    Args:
      model: an NNX module.
      params: a state like `nnx.state(model, nnx.Param)`.

    Raises:
      TypeError: `model` is not an NNX module.
      ValueError: `params` are not those of the module.
    """
    check_module(model, "nmjax.nnx.with_params(model, params)")
    new, old = named_variables(params), named_variables(nnx.state(model, nnx.Param))
    if new.keys() != old.keys():
        raise ValueError(
            "params must be a state like nnx.state(model, nnx.Param); missing: "
            f"{sorted(old.keys() - new.keys()) or 'none'}, not in the module: "
            f"{sorted(new.keys() - old.keys()) or 'none'}"
        )
    return with_variables(model, new)


def prune(model: nnx.Module, plan: Plan, masks: Masks | None = None) -> None:
    """Sets the pruned weights of a module to zero, in place.

    Args:
      model: an NNX module.
      plan: from `nmjax.nnx.make_plan`.
      masks: leaf name -> boolean array; computed from the parameters by default.

    Raises:
      TypeError: `model` is not an NNX module.
      ValueError: what `nmjax.prune` raises.

    >>> from nmjax.nnx.plans import make_plan
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> prune(model, make_plan(model, "1:4", inputs=((1, 8),)))
    >>> int((model.kernel[...] != 0).sum())
    8
    """
    check_module(model, "nmjax.nnx.prune(model, plan)")
    nnx.update(model, pruning.prune(nnx.state(model, nnx.Param), plan, masks))


def _with_planned(model: Model, params: Any, plan: Plan) -> Model:
    """A module that takes the planned parameters from a state, and shares the rest."""
    new = {name: x for name, x in named_variables(params).items() if name in plan}
    return with_variables(model, new)
