"""The plan for one call of a module's method, read off what the method does in that call."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import flax.errors
import flax.linen as nn
import jax

from nmjax import planning
from nmjax.layouts import Axes, layouts
from nmjax.linen.forward_pass import ForwardPass
from nmjax.patterns import Pattern
from nmjax.plans import Plan
from nmjax.pruning import planned_leaves
from nmjax.selection import by_rule
from nmjax.tracing.program import is_array, read_program
from nmjax.tracing.uses import Uses

# A call cannot be traced if its code needs the values of the input, or if it reads parameters that
# belong to another module.
_UNTRACEABLE = (jax.errors.JAXTypeError, flax.errors.ScopeParamNotFoundError)


def check_call(plan: Plan, call: ForwardPass) -> None:
    """Raises ValueError if the plan does not fit what a call does; passes if it is untraceable."""
    if call.params:
        planned_leaves(call.params, plan)  # Raises if the plan is for other parameters.
    if _uses(call):
        planning.check_axes(plan, call.run, call.params, call.inputs)


def plan_call(pattern: Pattern, selection: dict[str, Any], call: ForwardPass) -> Plan | None:
    """The plan for a call; None if the call is untraceable.

    Args:
      pattern: of the plan.
      selection: arguments of `nmjax.make_plan`.
      call: what the method does.
    """
    uses = _uses(call)
    if not uses:
        return None
    # The call does not read the parameters of other methods, but rules may name them.
    known = layouts({name: use.shape for name, use in uses.items()})
    unread = {
        f"^{re.escape(name)}$": axes
        for name, axes in known.items()
        if isinstance(axes, Axes) and axes.taps is not None and not _is_read(uses[name])
    }
    axes = {**by_rule(selection.get("axes"), "axes"), **unread}
    return planning.make_plan(
        call.params,
        pattern,
        forward=call.run,
        inputs=(call.inputs,),
        **{**selection, "axes": axes},
    )


def call_key(
    dense: nn.Module, name: str, variables: Any, args: Any, kwargs: Any
) -> Hashable | None:
    """What the plan of a call depends on; None if a part of it cannot be hashed."""
    leaves, structure = jax.tree.flatten((dict(variables), args, kwargs))
    described = [(leaf.shape, leaf.dtype) if is_array(leaf) else leaf for leaf in leaves]
    key = (dense, name, structure, *described)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _uses(call: ForwardPass) -> dict[str, Uses]:
    """What a call does with each parameter; nothing if it is untraceable or has no input."""
    if not call.params or not call.inputs:
        return {}
    try:
        return read_program(call.run, call.params, call.inputs).uses
    except _UNTRACEABLE:
        return {}


def _is_read(use: Uses) -> bool:
    return bool(use.is_used or use.lost_in or use.derived_from)
