"""What a plan does with each leaf, as path rules select it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from nmjax.layouts.axes import Axes, GivenAxes, Shape, Unknown, given_axes
from nmjax.patterns import Pattern
from nmjax.patterns.pattern import LeafPlan
from nmjax.plans import DenseLeaf
from nmjax.tracing.uses import Uses
from nmjax.trees.path_rules import first_match

PlannedLeaf = LeafPlan | DenseLeaf


class FoundAxes(NamedTuple):
    """The axes of a leaf, or why it has none, where they come from, and what the program does."""

    axes: Axes | str | Unknown
    source: str
    uses: Uses | None = None


@dataclass(frozen=True)
class Selection:
    """What the user asked for, parsed."""

    pattern: Pattern
    exclude: tuple[str, ...]
    include: tuple[str, ...] | None
    rules: dict[str, Pattern | None]
    axes: dict[str, GivenAxes]

    def plan_leaf(self, name: str, leaf: Any, found: FoundAxes) -> PlannedLeaf:
        """The plan of one leaf, or why it stays dense."""
        shape = tuple(getattr(leaf, "shape", ()))
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return DenseLeaf(shape, "not an array", is_array=False)
        axes, source, uses = self._given(name, shape) or found
        # The layer's reason comes first: a bias is listed as a bias even if a rule excludes it.
        if isinstance(axes, str):
            return DenseLeaf(shape, axes)
        excluded = first_match(self.exclude, name)
        if excluded is not None:
            return DenseLeaf(shape, f"excluded by {excluded!r}")
        if self.include is not None and first_match(self.include, name) is None:
            return DenseLeaf(shape, "not included")
        rule = first_match(self.rules, name)
        pattern = self.pattern if rule is None else self.rules[rule]
        if pattern is None:
            return DenseLeaf(shape, _left_dense(rule))
        if isinstance(axes, Unknown):
            # Tables of integers and masks are no weights, whatever their axes are.
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return DenseLeaf(shape, f"dtype {leaf.dtype}")
            return DenseLeaf(shape, f"unknown axes: {axes.reason}", is_unknown=True)
        if pattern.needs_taps and axes.taps is None:
            rule = first_match(self.axes, name)
            # The first rule that matches wins, so another one for this leaf would have no effect.
            instead = "" if rule is None else f" instead of {{{rule!r}: {self.axes[rule]!r}}}"
            raise ValueError(
                f"{name} of shape {shape} cannot take {pattern}: the shape does not determine "
                "which axes are outputs, which are the taps of a filter, and which are a stack of "
                f"layers. Pass axes={{{name + '$'!r}: nmjax.Axes(reduction=..., output=..., "
                f"taps=...)}}{instead}, exclude the leaf, or give it another pattern in rules="
            )
        reduction, output, taps = pattern.place(axes)
        planned = LeafPlan(pattern, reduction, output, shape, taps or (), source)
        apart = moved_apart(planned, uses)
        return DenseLeaf(shape, f"unknown axes: {apart}", is_unknown=True) if apart else planned

    def _given(self, name: str, shape: Shape) -> FoundAxes | None:
        rule = first_match(self.axes, name)
        if rule is None:
            return None
        try:
            return FoundAxes(given_axes(self.axes[rule], len(shape)), "given")
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"axes={{{rule!r}: {self.axes[rule]}}} does not fit {name} of shape {shape}: "
                f"{error}"
            ) from error

    def check_rules_apply(self, planned: Mapping[str, PlannedLeaf]) -> None:
        """Raises ValueError if a rule in `rules` has no effect on any leaf."""
        for rule, pattern in self.rules.items():
            matched = {name: leaf for name, leaf in planned.items() if re.search(rule, name)}
            sparse = [name for name, leaf in matched.items() if isinstance(leaf, LeafPlan)]
            if pattern is None:
                left_dense = (DenseLeaf(leaf.shape, _left_dense(rule)) for leaf in matched.values())
                # Leaves may be dense for another reason first. That is what the rule asked for.
                has_effect = not sparse or any(leaf in matched.values() for leaf in left_dense)
            else:
                has_effect = any(first_match(self.rules, name) == rule for name in sparse)
            if has_effect:
                continue
            raise ValueError(
                f"the rule {rule!r}: {pattern} makes no leaf "
                f"{'dense' if pattern is None else 'sparse'}. It matches:\n"
                + "\n".join(
                    f"  {name} {leaf.shape}: "
                    + (leaf.reason if isinstance(leaf, DenseLeaf) else "taken by an earlier rule")
                    for name, leaf in matched.items()
                )
            )


def moved_apart(planned: LeafPlan, uses: Uses | None) -> str:
    """How a program moves the weights of a group or block apart; empty if it does not.

    The leaf may then be sparse while what the program multiplies by is not.
    """
    if uses is None or len(uses.shape) < len(planned.shape):
        return ""
    span, length, what = planned.pattern.unit(planned.axes)
    for product in uses.contractions:
        # Products along other axes are another fault, and a bias has no groups.
        if planned.pattern.place(product.axes).reduction != planned.reduction_axes:
            continue
        for together, why in product.stretches(span, uses.shape):
            if together % length:
                return f"the program breaks its {what}: {why}"
    return ""


def by_rule(given: Mapping[str, Any] | None, argument: str) -> dict[str, Any]:
    """Checks an argument that maps path rules to values."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{argument}= must map path rules to values, got {given!r}")
    return dict(given or {})


def _left_dense(rule: str | None) -> str:
    return f"left dense by the rule {rule!r}"
