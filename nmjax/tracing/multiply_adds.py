"""Counts the multiply-adds of each parameter by reading the traced program.

Each matrix product and convolution is charged to the parameter that feeds it, even if the program
masks, reshapes or casts that parameter first. So the count works for any library and any wiring:
shared weights are charged once for each use, scanned layers once for each pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from nmjax.tracing.variables import is_variable
from nmjax.trees.leaves import named_leaves

if TYPE_CHECKING:
    from jax.extend import core

# Marks a value that depends on the network's input, and so belongs to no parameter.
_ACTIVATION = object()

# Variable of the program -> name of the parameter it was computed from, `_ACTIVATION`, or None for
# a constant.
Owners = dict[Any, Any]


def multiply_adds(forward: Callable[..., Any], params: Any, *inputs: Any) -> dict[str | None, int]:
    """Counts the multiply-adds of `forward(params, *inputs)` for each parameter.

    Products with padding count. A conditional counts as its first branch, which `lax.cond` takes
    if its predicate is false. A while loop counts as one pass.

    Args:
      forward: the network's forward pass; it is traced, not run.
      params: its parameters, arrays or ShapeDtypeStructs.
      *inputs: its inputs, arrays or ShapeDtypeStructs.

    Returns:
      Leaf name -> multiply-adds, for the leaves that have any. The key None stands for products
      of activations, such as attention scores.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.zeros((8, 16))}
    >>> multiply_adds(lambda params, x: x @ params["kernel"], params, jnp.zeros((2, 8)))
    {'kernel': 256}
    """
    closed = jax.make_jaxpr(forward)(params, *inputs)
    owners: Owners = dict.fromkeys(closed.jaxpr.invars, _ACTIVATION)
    # The parameters come first among the program's arguments.
    owners.update(zip(closed.jaxpr.invars, named_leaves(params), strict=False))
    counts: Counter[str | None] = Counter()
    for owner, count in _products(closed.jaxpr, owners, 1):
        counts[owner] += count
    return dict(counts)


def _products(jaxpr: core.Jaxpr, owners: Owners, times: int) -> Iterator[tuple[str | None, int]]:
    """Yields (parameter or None, multiply-adds) for each product, and extends `owners`."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield _parameter(equation.invars, owners), times * _of_equation(equation)
        body = _body(equation, owners)
        if body is None:
            owner = _owner(equation.invars, owners)
            owners.update(dict.fromkeys(equation.outvars, owner))
        else:
            inner, inner_owners, passes = body
            yield from _products(inner, inner_owners, times * passes)
            for outer, result in zip(equation.outvars, inner.outvars, strict=True):
                owners[outer] = _owner([result], inner_owners)


def _parameter(variables: Sequence[Any], owners: Owners) -> str | None:
    """The name of the largest parameter among `variables`; None if there is none."""
    owned = [v for v in variables if is_variable(v) and owners.get(v) not in (None, _ACTIVATION)]
    return owners[max(owned, key=lambda v: math.prod(_shape(v)))] if owned else None


def _owner(variables: Sequence[Any], owners: Owners) -> Any:
    """Returns who owns a value computed from `variables`: a parameter, `_ACTIVATION` or None."""
    if any(is_variable(v) and owners.get(v) is _ACTIVATION for v in variables):
        return _ACTIVATION
    return _parameter(variables, owners)


def _body(equation: core.JaxprEqn, owners: Owners) -> tuple[core.Jaxpr, Owners, int] | None:
    """Returns the program inside an equation, the owners of its operands, and how often it runs.

    None if there is no program inside.
    """
    parameters, operands = equation.params, list(equation.invars)
    passes, carried = 1, slice(0, 0)
    if equation.primitive.name == "cond":
        body, operands = parameters["branches"][0], operands[1:]
    elif equation.primitive.name == "while":
        body, operands = parameters["body_jaxpr"], operands[parameters["cond_nconsts"] :]
        carried = slice(parameters["body_nconsts"], None)
    else:
        keys = [key for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in parameters]
        if not keys:
            return None
        body = parameters[keys[0]]
        if equation.primitive.name == "scan":
            passes, carried = parameters["length"], _carry_of_scan(parameters)
    jaxpr = getattr(body, "jaxpr", body)
    inner = {v: _owner([outer], owners) for v, outer in zip(jaxpr.invars, operands, strict=True)}
    # A carry that starts as a parameter depends on the input after the first pass.
    if _owner(operands, owners) is _ACTIVATION:
        inner.update(dict.fromkeys(jaxpr.invars[carried], _ACTIVATION))
    return jaxpr, inner, passes


def _carry_of_scan(parameters: Mapping[str, Any]) -> slice:
    """Returns which operands of a scan it carries from pass to pass."""
    if "ft_in" in parameters:  # jax 0.12 and later: a tree of (constants, carry, inputs).
        constants, carry, _ = (len(list(part)) for part in parameters["ft_in"].unpack())
    else:
        constants, carry = parameters["num_consts"], parameters["num_carry"]
    return slice(constants, constants + carry)


def _of_equation(equation: core.JaxprEqn) -> int:
    """Multiply-adds of a dot_general or a convolution: outputs times inputs summed per output."""
    outputs = math.prod(_shape(equation.outvars[0]))
    shapes = [_shape(v) for v in equation.invars]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return outputs * math.prod(shapes[0][axis] for axis in contracted)
    kernel = equation.params["dimension_numbers"].rhs_spec
    # A transposed convolution puts zeros between its inputs, which do not count.
    stride = math.prod(equation.params["lhs_dilation"])
    return outputs * math.prod(shapes[1]) // (shapes[1][kernel[0]] * stride)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
