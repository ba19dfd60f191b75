"""Plans and costs of NNX modules."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from nmjax import planning
from nmjax.analysis import costs
from nmjax.nnx.forward_pass import check_module, forward_pass
from nmjax.nnx.variables import named_variables
from nmjax.patterns import Pattern
from nmjax.plans import DenseLeaf, Plan
from nmjax.trees.path_rules import as_rules


def make_plan(
    model: nnx.Module,
    pattern: str | Pattern,
    inputs: Sequence[Any],
    *,
    call: Mapping[str, Any] | None = None,
    **selection: Any,
) -> Plan:
    """Decides which parameters of a module become sparse, along the axes that it sums over.

    The module is traced, not run, and stays as it is: `nmjax.make_plan` reads the axes off its
    program. The plan is for `nnx.state(model, nnx.Param)`. LoRA adapters stay dense.

    Args:
      model: an NNX module, or its shapes (`nnx.eval_shape`). Dropout and batch normalization are
        traced as the module is set (`model.train()`, `model.eval()`).
      pattern: such as `"2:4"`.
      inputs: the arguments of the module's `__call__`, in a tuple: arrays, ShapeDtypeStructs, or
        shapes of float32 arrays. For token ids pass `jax.ShapeDtypeStruct(shape, jnp.int32)`.
      call: keyword arguments of `__call__`, which stay as they are.
      **selection: other arguments of `nmjax.make_plan`, such as `exclude`.

    Raises:
      TypeError: `model` is not an NNX module; `forward` or an unknown argument is given.
      ValueError: what `nmjax.make_plan` raises.

    >>> plan = make_plan(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), "2:4", inputs=((1, 8),))
    >>> plan["kernel"].reduction_axes, plan["kernel"].source
    ((-2,), 'program')
    """
    check_module(model)
    if not isinstance(inputs, tuple | list):
        raise TypeError(
            "inputs= must be a tuple of the arguments of the module's __call__, such as "
            f"inputs=(x,); got {type(inputs).__name__}"
        )
    unknown = selection.keys() - inspect.signature(planning.make_plan).parameters.keys()
    if unknown or "forward" in selection:
        raise TypeError(
            "nnx.make_plan reads the program of the module's __call__ itself, and takes keyword "
            'arguments of it in call=, such as call={"deterministic": True}; got '
            f"{sorted(selection)}"
        )
    run, params, arrays = forward_pass(model, inputs, call or {})
    adapters = _adapters(model)
    rules = (f"^{re.escape(name)}$" for name in sorted(adapters))
    exclude = (*rules, *as_rules(selection.pop("exclude", ())))
    plan = planning.make_plan(
        params, pattern, forward=run, inputs=arrays, exclude=exclude, **selection
    )
    # The rules above are not the user's, so the table must not show them as the reason.
    leaves = (
        (name, DenseLeaf(leaf.shape, "LoRA adapter") if name in adapters else leaf)
        for name, leaf in plan.leaves
    )
    return dataclasses.replace(plan, leaves=tuple(leaves))


def cost(
    model: nnx.Module, plan: Plan | str | Pattern | None, *inputs: Any, **kwargs: Any
) -> costs.Cost:
    """Counts a module's weights and multiply-adds, layer by layer, without running it.

    Args:
      model: an NNX module, or its shapes (`nnx.eval_shape`).
      plan: from `make_plan`; a pattern, for a plan with the default rules; None for the dense
        network.
      *inputs: the arguments of the module's `__call__`: arrays, ShapeDtypeStructs, or shapes of
        float32 arrays. For token ids pass `jax.ShapeDtypeStruct(shape, jnp.int32)`. For the cost
        of one example, use a batch size of 1.
      **kwargs: keyword arguments of `__call__`, which stay as they are.

    >>> print(cost(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), "2:4", (1, 8)))
    leaf    pattern  weights  kept  multiply-adds  kept   share
    ------  -------  -------  ----  -------------  ----  ------
    bias    dense          4     4              0     0    0.0%
    kernel  2:4           32    16             32    16  100.0%
    total                 36    20             32    16  100.0%
    """
    check_module(model, "nmjax.nnx.cost(model, plan, x)")
    if plan is not None and not isinstance(plan, Plan):
        plan = make_plan(model, plan, inputs, call=kwargs)
    run, params, arrays = forward_pass(model, inputs, kwargs)
    return costs.cost(run, params, *arrays, plan=plan)


def _adapters(model: nnx.Module) -> set[str]:
    """Names of the weights of LoRA layers, without those of the layers that they adapt."""
    # By layer, not only by type: `lora_param_type=` may be any type of variable.
    of_layers = {
        id(variable)
        for _, layer in nnx.iter_graph(model)
        if isinstance(layer, nnx.LoRA)
        for variable in (layer.lora_a, layer.lora_b)
    }
    return {
        name
        for name, variable in named_variables(nnx.state(model, nnx.Param)).items()
        if isinstance(variable, nnx.LoRAParam) or id(variable) in of_layers
    }
