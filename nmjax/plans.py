"""Plans: which leaves become sparse, with which pattern, along which axes, and why others do not.

A plan is made once, and is static data after that. Every mask, gradient term, metric, and file of a
model uses the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import jax

from nmjax.layouts.axes import Shape
from nmjax.masks.scores import Score, magnitude
from nmjax.patterns.pattern import LeafPlan as LeafPlan
from nmjax.tables import Row, html_table, text_table

_HEADER = ("leaf", "shape", "pattern", "axes", "axes from", "weights", "kept", "why dense")
_NUMBERS = (5, 6)


@dataclass(frozen=True)
class DenseLeaf:
    """A leaf that stays dense.

    Attributes:
      shape: of the leaf.
      reason: why it stays dense.
      is_unknown: whether it might be a weight whose axes nobody gave.
      is_array: whether it holds parameters. Equinox modules have other leaves, such as functions.
    """

    shape: Shape
    reason: str
    is_unknown: bool = False
    is_array: bool = True

    @property
    def weights(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape) if self.is_array else 0


# Static, so that jit keys its cache by the plan's value: an equal plan does not recompile.
@jax.tree_util.register_static
@dataclass(frozen=True)
class Plan(Mapping[str, LeafPlan]):
    """A mapping from leaf name to `LeafPlan`, for the planned leaves only.

    Static and hashable: close over it, or pass it to a jitted function like any other argument.
    `print(plan)` shows a table of all leaves; a notebook shows it as HTML.

    Attributes:
      leaves: (name, plan) of every leaf of the tree, in tree order.
      score: function that ranks the weights of a group.
    """

    leaves: tuple[tuple[str, LeafPlan | DenseLeaf], ...]
    score: Score = magnitude

    # Allowed in a frozen class: the cache writes to `__dict__` directly, and no field changes.
    @cached_property
    def _sparse(self) -> dict[str, LeafPlan]:
        return {name: leaf for name, leaf in self.leaves if isinstance(leaf, LeafPlan)}

    @property
    def dense(self) -> dict[str, str]:
        """The reason why each other leaf stays dense, by name."""
        return {name: leaf.reason for name, leaf in self.leaves if isinstance(leaf, DenseLeaf)}

    @property
    def warning(self) -> str:
        """Says so if most weights are dense only because their axes are unknown; else empty."""
        total = sum(leaf.weights for _, leaf in self.leaves)
        dense = [leaf for _, leaf in self.leaves if isinstance(leaf, DenseLeaf)]
        weights = sum(leaf.weights for leaf in dense if leaf.is_unknown)
        if 2 * weights <= total:
            return ""
        return (
            f"WARNING: {weights:,} of {total:,} parameters ({weights / total:.0%}) stay dense only "
            "because their axes are unknown. Pass forward= and inputs=, or axes=, to make_plan."
        )

    def __getitem__(self, name: str) -> LeafPlan:
        return self._sparse[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sparse)

    def __len__(self) -> int:
        return len(self._sparse)

    def __str__(self) -> str:
        notes = "\n\n".join(filter(None, (self._summary(), self.warning)))
        return f"{text_table(_HEADER, self._rows(), right=_NUMBERS)}\n\n{notes}"

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{note}</p>" for note in (self._summary(), self.warning) if note)
        return f"{html_table(_HEADER, self._rows(), right=_NUMBERS)}{notes}"

    def _rows(self) -> list[Row]:
        return [_row(name, leaf) for name, leaf in self.leaves]

    def _summary(self) -> str:
        total = sum(leaf.weights for _, leaf in self.leaves)
        planned = sum(leaf.weights for leaf in self.values())
        kept = total - planned + sum(leaf.kept for leaf in self.values())
        return (
            f"{len(self)} of {len(self.leaves)} leaves are sparse; they hold {planned:,} of "
            f"{total:,} parameters. {kept:,} parameters are kept ({kept / max(total, 1):.1%})."
        )


def check_plan(plan: object) -> None:
    """Raises TypeError unless `plan` is a `Plan`; a pattern in its place is an easy mistake."""
    if not isinstance(plan, Plan):
        got = plan if isinstance(plan, str) else type(plan).__name__
        raise TypeError(
            f"expected a plan, got {got!r}; make one from parameters and a pattern, such as "
            'nmjax.make_plan(params, "2:4"), and pass it as in nmjax.prune(params, plan)'
        )


def _row(name: str, leaf: LeafPlan | DenseLeaf) -> Row:
    shape = "x".join(map(str, leaf.shape)) or "scalar"
    weights = f"{leaf.weights:,}"
    if isinstance(leaf, DenseLeaf):
        shape = shape if leaf.is_array else ""
        return (name, shape, "dense", "", "", weights, weights, leaf.reason)
    return (name, shape, str(leaf.pattern), leaf.span, leaf.source, weights, f"{leaf.kept:,}", "")
