"""A table of a network's weights and multiply-adds, dense and under a plan, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from nmjax.plans import LeafPlan, Plan, check_plan
from nmjax.tables import Row, html_table, text_table
from nmjax.tracing.multiply_adds import multiply_adds
from nmjax.trees.leaves import named_leaves

_HEADER = ("leaf", "pattern", "weights", "kept", "multiply-adds", "kept", "share")
_NUMBERS = (2, 3, 4, 5, 6)


@dataclass(frozen=True)
class LeafCost:
    """Cost of one leaf.

    Attributes:
      pattern: its pattern as text, or "dense".
      weights: number of weights.
      weights_kept: number of weights that the pattern keeps.
      macs: multiply-adds of one forward pass through the dense leaf.
      macs_kept: multiply-adds with the kept weights only.
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
      other_macs: multiply-adds of products of activations, such as attention scores.
    """

    leaves: dict[str, LeafCost]
    other_macs: int = 0

    @property
    def total(self) -> LeafCost:
        """The sum over the leaves and the products of activations."""
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
        every = max(self.total.macs, 1)  # A network without products must not divide by zero.
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

    Products with padding count. A conditional counts as its first branch, which `lax.cond` takes
    if its predicate is false. A while loop counts as one pass.

    Args:
      forward: the network's forward pass; it is traced, not run.
      params: its parameters, arrays or ShapeDtypeStructs.
      *inputs: all of its inputs, arrays or ShapeDtypeStructs. Arrays that `forward` closes over
        count as constants. For the cost of one example, pass a batch of one.
      plan: which leaves are sparse; None for the dense network.

    Raises:
      ValueError: there are no inputs, or the plan names a leaf that `params` does not have.

    >>> import jax.numpy as jnp
    >>> import nmjax
    >>> params = {"kernel": jnp.zeros((8, 16))}
    >>> forward = lambda params, x: x @ params["kernel"]
    >>> table = cost(forward, params, jnp.zeros((1, 8)), plan=nmjax.make_plan(params, "2:4"))
    >>> table.total.macs, table.total.macs_kept
    (128, 64)
    """
    if isinstance(forward, Plan):
        raise TypeError(
            "expected the forward pass, got a plan; pass the plan by name, as in "
            "cost(forward, params, x, plan=plan)"
        )
    if plan is not None:
        check_plan(plan)
    if not jax.tree.leaves(inputs):
        raise ValueError(
            "cost needs the network's inputs as arguments, as in cost(forward, params, x), to "
            "distinguish activations from weights"
        )
    leaves = named_leaves(params)
    planned: dict[str, LeafPlan] = dict(plan or {})
    if not planned.keys() <= leaves.keys():
        raise ValueError(
            f"the plan names leaves that params does not have: {sorted(planned.keys() - leaves)}"
        )
    macs = multiply_adds(forward, params, *inputs)
    return Cost(
        {
            name: _leaf_cost(leaf, planned.get(name), macs.get(name, 0))
            for name, leaf in leaves.items()
        },
        macs.get(None, 0),
    )


def _leaf_cost(leaf: Any, planned: LeafPlan | None, macs: int) -> LeafCost:
    weights = math.prod(jnp.shape(leaf))
    if planned is None:
        return LeafCost("dense", weights, weights, macs, macs)
    # All weights of a leaf take part in the same number of multiply-adds.
    # Below, products come before the division: `kept // of` alone would be 0.
    kept, of = planned.kept, max(planned.weights, 1)
    return LeafCost(str(planned.pattern), weights, weights * kept // of, macs, macs * kept // of)
