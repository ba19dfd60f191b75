"""Weights and multiply-adds of a network, dense and under a plan, layer by layer.

The network is traced, not run, and each matrix product and convolution is charged to the parameter
that feeds it, however it was masked, reshaped or cast before. So the count holds for any library
and any wiring: shared weights are charged once for each use, scanned layers once for each pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from nmjax.plans import LeafPlan, Plan
from nmjax.tables import Row, html_table, text_table
from nmjax.trees.leaves import named_leaves

_HEADER = ("leaf", "pattern", "weights", "kept", "multiply-adds", "kept", "share")
_NUMBERS = (2, 3, 4, 5, 6)

# Marks a value that depends on the network's input, and so belongs to no parameter.
_ACTIVATION = object()

Owners = dict[core.Var, Any]


@dataclass(frozen=True)
class LeafCost:
    """Cost of one leaf.

    Attributes:
      pattern: its pattern as text, or "dense".
      weights: number of weights.
      weights_kept: number of weights that stay.
      macs: multiply-adds of one forward pass through the dense leaf.
      macs_kept: multiply-adds with the weights that stay.
    """

    pattern: str
    weights: int
    weights_kept: int
    macs: int
    macs_kept: int


@dataclass(frozen=True)
class Cost:
    """Cost of a network; `print(cost)` shows a table.

    Attributes:
      leaves: leaf name -> its cost, in tree order.
      other_macs: multiply-adds of products without a parameter, such as attention scores.
    """

    leaves: dict[str, LeafCost]
    other_macs: int = 0

    @property
    def total(self) -> LeafCost:
        """The sum over the leaves, products without a parameter included."""
        leaves = self.leaves.values()
        return LeafCost(
            "",
            sum(leaf.weights for leaf in leaves),
            sum(leaf.weights_kept for leaf in leaves),
            sum(leaf.macs for leaf in leaves) + self.other_macs,
            sum(leaf.macs_kept for leaf in leaves) + self.other_macs,
        )

    def __str__(self) -> str:
        return text_table(_HEADER, self._rows(), right=_NUMBERS)

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows(), right=_NUMBERS)

    def _rows(self) -> list[Row]:
        others = LeafCost("", 0, 0, self.other_macs, self.other_macs)
        named = {**self.leaves, "(products of activations)": others, "total": self.total}
        every = max(self.total.macs, 1)
        return [
            (
                name,
                leaf.pattern,
                f"{leaf.weights:,}",
                f"{leaf.weights_kept:,}",
                f"{leaf.macs:,}",
                f"{leaf.macs_kept:,}",
                f"{leaf.macs / every:.1%}",
            )
            for name, leaf in named.items()
            if leaf.weights or leaf.macs
        ]


def cost(forward: Callable[..., Any], params: Any, *inputs: Any, plan: Plan | None = None) -> Cost:
    """Counts the weights and multiply-adds of `forward(params, *inputs)`.

    Products with padding count. Of a conditional the first branch counts, the one that `lax.cond`
    takes when its predicate is false; a while loop counts as one pass.

    Args:
      forward: the network's forward pass; it is traced and not run.
      params: its parameters, arrays or ShapeDtypeStructs.
      *inputs: its inputs, arrays or ShapeDtypeStructs; all of them, since what `forward` closes
        over is taken for a constant. Their batch size counts: for the cost of one example give a
        batch of one.
      plan: which leaves are sparse; None for the dense network.

    Raises:
      ValueError: no inputs; the plan names a leaf that `params` does not have.

    >>> import jax.numpy as jnp
    >>> import nmjax
    >>> params = {"kernel": jnp.zeros((8, 16))}
    >>> forward = lambda params, x: x @ params["kernel"]
    >>> table = cost(forward, params, jnp.zeros((1, 8)), plan=nmjax.make_plan(params, "2:4"))
    >>> table.total.macs, table.total.macs_kept
    (128, 64)
    """
    if not jax.tree.leaves(inputs):
        raise ValueError(
            "cost needs the network's inputs as arguments, cost(forward, params, x), to tell "
            "activations from weights"
        )
    leaves = named_leaves(params)
    planned: dict[str, LeafPlan] = dict(plan or {})
    if not planned.keys() <= leaves.keys():
        raise ValueError(f"the plan names leaves not in params: {sorted(planned.keys() - leaves)}")
    closed = jax.make_jaxpr(forward)(params, *inputs)
    owners = dict.fromkeys(closed.jaxpr.invars, _ACTIVATION)
    owners.update(zip(closed.jaxpr.invars, leaves, strict=False))
    macs: Counter[Any] = Counter()
    for owner, count in _products(closed.jaxpr, owners, 1):
        macs[owner] += count
    return Cost(
        {name: _leaf_cost(leaf, planned.get(name), macs[name]) for name, leaf in leaves.items()},
        macs[None],
    )


def _leaf_cost(leaf: Any, planned: LeafPlan | None, macs: int) -> LeafCost:
    weights = math.prod(jnp.shape(leaf))
    if planned is None:
        return LeafCost("dense", weights, weights, macs, macs)
    kept, of = planned.kept, max(planned.weights, 1)
    return LeafCost(str(planned.pattern), weights, weights * kept // of, macs, macs * kept // of)


def _products(jaxpr: core.Jaxpr, owners: Owners, times: int) -> Iterator[tuple[str | None, int]]:
    """Yields (parameter or None, multiply-adds) for each product, and extends `owners`."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield _parameter(equation.invars, owners), times * _multiply_adds(equation)
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
    owned = [
        v for v in variables if isinstance(v, core.Var) and owners.get(v) not in (None, _ACTIVATION)
    ]
    return owners[max(owned, key=lambda v: math.prod(_shape(v)))] if owned else None


def _owner(variables: Sequence[Any], owners: Owners) -> Any:
    """Whose value follows from `variables`: a parameter's, the input's, or nobody's (None)."""
    if any(isinstance(v, core.Var) and owners.get(v) is _ACTIVATION for v in variables):
        return _ACTIVATION
    return _parameter(variables, owners)


def _body(equation: core.JaxprEqn, owners: Owners) -> tuple[core.Jaxpr, Owners, int] | None:
    """The program inside an equation, the owners of its operands, and how often it runs.

    Of a conditional the first branch is taken; a while loop, whose length is not known, counts
    as one pass.
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
            passes, first = parameters["length"], parameters["num_consts"]
            carried = slice(first, first + parameters["num_carry"])
    jaxpr = getattr(body, "jaxpr", body)
    inner = {v: _owner([outer], owners) for v, outer in zip(jaxpr.invars, operands, strict=True)}
    if _owner(operands, owners) is _ACTIVATION:
        inner.update(dict.fromkeys(jaxpr.invars[carried], _ACTIVATION))
    return jaxpr, inner, passes


def _multiply_adds(equation: core.JaxprEqn) -> int:
    """Multiply-adds of a dot_general or a convolution: outputs times inputs summed for each."""
    outputs = math.prod(_shape(equation.outvars[0]))
    shapes = [_shape(v) for v in equation.invars]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return outputs * math.prod(shapes[0][axis] for axis in contracted)
    kernel = equation.params["dimension_numbers"].rhs_spec
    # A transposed convolution sets zeros between its inputs, which nobody multiplies.
    stride = math.prod(equation.params["lhs_dilation"])
    return outputs * math.prod(shapes[1]) // (shapes[1][kernel[0]] * stride)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
