"""Plans and costs of linen modules, from the shapes of their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from nmjax import planning
from nmjax.analysis import costs
from nmjax.linen.forward_pass import check_module, forward_pass
from nmjax.patterns import Pattern
from nmjax.plans import Plan


def make_plan(
    module: nn.Module,
    pattern: str | Pattern,
    *inputs: Any,
    call: Mapping[str, Any] | None = None,
    **selection: Any,
) -> Plan:
    """Decides which parameters of a module become sparse, along the axes that it sums over.

    The module is traced, not run: `nmjax.make_plan` reads the axes off its program.

    Args:
      module: a linen module.
      pattern: such as `"2:4"`.
      *inputs: the module's inputs as arrays, ShapeDtypeStructs or shapes (of float32). For token
        ids pass `jax.ShapeDtypeStruct(shape, jnp.int32)`.
      call: keyword arguments of the module's `__call__`, such as `{"train": False}`; with
        `"method"`, of that method instead.
      **selection: other arguments of `nmjax.make_plan`, such as `exclude`.

    Raises:
      TypeError: `module` is not a linen module instance.
      ValueError: what `nmjax.make_plan` raises.

    >>> plan = make_plan(nn.Dense(4), "2:4", (1, 8))
    >>> plan["kernel"].reduction_axes, plan["kernel"].source
    ((-2,), 'program')
    """
    unknown = selection.keys() - inspect.signature(planning.make_plan).parameters.keys()
    if unknown or {"forward", "inputs"} & selection.keys():
        raise TypeError(
            "linen.make_plan takes the module's inputs as arguments, as in make_plan(module, "
            '"2:4", x), and keyword arguments of its __call__ in call=, such as '
            f'call={{"train": False}}; got {sorted(selection)}'
        )
    check_module(module)
    if not isinstance(pattern, str | Pattern) and any(isinstance(x, str | Pattern) for x in inputs):
        raise TypeError(
            "the pattern comes before the inputs: swap the arguments, as in "
            'make_plan(module, "2:4", x)'
        )
    run, params, arrays = forward_pass(module, inputs, call or {})
    return planning.make_plan(params, pattern, forward=run, inputs=(arrays,), **selection)


def cost(
    module: nn.Module, plan: Plan | str | Pattern | None, *inputs: Any, **kwargs: Any
) -> costs.Cost:
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
    check_module(module, "nmjax.linen.cost(module, plan, x)")
    run, params, arrays = forward_pass(module, inputs, kwargs)
    if plan is not None and not isinstance(plan, Plan):
        plan = planning.make_plan(params, plan, forward=run, inputs=(arrays,))
    return costs.cost(run, params, arrays, plan=plan)
