"""Plans: which leaves become sparse, with which pattern, along which axes, and why others do not.

A plan is made once, from names and shapes, and is static data after that. Every mask, gradient
term, metric, and file of a model uses the same plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nmjax.layouts import Axes, GivenAxes, Shape, given_axes, layout
from nmjax.masks.scores import Score, magnitude
from nmjax.patterns import Pattern, parse_pattern
from nmjax.patterns.pattern import LeafPlan as LeafPlan
from nmjax.tables import Row, html_table, text_table
from nmjax.trees.leaves import named_leaves
from nmjax.trees.path_rules import PathRules, as_rules, check_rules, first_match

_HEADER = ("leaf", "shape", "pattern", "axes", "weights", "kept", "why dense")
_NUMBERS = (4, 5)


@dataclass(frozen=True)
class DenseLeaf:
    """A leaf that stays dense: its shape and the reason."""

    shape: Shape
    reason: str


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

    def __getitem__(self, name: str) -> LeafPlan:
        return self._sparse[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sparse)

    def __len__(self) -> int:
        return len(self._sparse)

    def __str__(self) -> str:
        return f"{text_table(_HEADER, self._rows(), right=_NUMBERS)}\n\n{self._summary()}"

    def _repr_html_(self) -> str:
        return f"{html_table(_HEADER, self._rows(), right=_NUMBERS)}<p>{self._summary()}</p>"

    def _rows(self) -> list[Row]:
        return [_row(name, leaf) for name, leaf in self.leaves]

    def _summary(self) -> str:
        total = sum(math.prod(leaf.shape) for _, leaf in self.leaves)
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
            f"expected a plan, got {got!r}; make one from parameters and a pattern: "
            "nmjax.make_plan(params, pattern)"
        )


def make_plan(
    params: Any,
    pattern: str | Pattern,
    *,
    exclude: PathRules = (),
    include: PathRules | None = None,
    rules: Mapping[str, str | Pattern | None] | None = None,
    axes: Mapping[str, GivenAxes] | None = None,
    on_indivisible: Literal["error", "dense"] = "error",
    score: Score = magnitude,
) -> Plan:
    """Decides which leaves of `params` become sparse, with which pattern, and along which axes.

    Path rules are regular expressions that match anywhere in a leaf's name (`"a/b/kernel"`).
    Biases, normalizations, embeddings, and depthwise convolutions stay dense by default.

    Args:
      params: parameters, or anything with the same tree, shapes, and dtypes (`jax.eval_shape`):
        dicts, FrozenDicts, dataclasses, boxed Flax leaves, NNX states, Equinox modules.
      pattern: pattern of every leaf that `rules` do not mention, such as `"2:4"`, `NM(2, 4)`, or
        `"1x16@0.5"`.
      exclude: path rules of leaves to leave dense.
      include: if given, only leaves that match these path rules can become sparse.
      rules: path rule -> the pattern of the leaves that match, or None to leave them dense. The
        first rule that matches wins.
      axes: path rule -> the reduction axes of the leaves that match, where names and shapes do not
        determine them. Such leaves always count as weights. All other axes count as outputs; use
        `nmjax.Axes` to say which are outputs and which are taps, as blocks need for weights with
        more than two axes.
      on_indivisible: what to do with a leaf that does not divide into whole groups or blocks:
        `"error"`, or `"dense"` to leave it dense and record the reason.
      score: importance of each weight, a function of the weight array. A block's importance is the
        sum over its weights, which is its L1 norm by default. Pass a named function rather than a
        new lambda each time: two plans are equal, and share the jit cache, only if the score is the
        same object.

    Raises:
      TypeError: a leaf to become sparse does not have a floating dtype; a pattern, path rule, or
        axis has the wrong type.
      ValueError: the tree has no leaves; a pattern does not parse; a path rule is not a regular
        expression or matches no leaf; a rule in `rules` has no effect; a leaf does not have the
        given axes, or its pattern needs axes that the shape does not determine; leaves do not
        divide into whole groups or blocks (the error lists all of them); no leaf becomes sparse.

    >>> params = {"Dense_0": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}}
    >>> plan = make_plan(params, "2:4")
    >>> plan["Dense_0/kernel"].reduction_axes
    (-2,)
    >>> plan.dense
    {'Dense_0/bias': 'bias'}
    """
    if on_indivisible not in ("error", "dense"):
        raise ValueError(f'on_indivisible must be "error" or "dense", got {on_indivisible!r}')
    leaves = named_leaves(params)
    if not leaves:
        raise ValueError("the parameter tree has no leaves to plan")
    choice = _Selection(
        pattern=parse_pattern(pattern),
        exclude=as_rules(exclude),
        include=None if include is None else as_rules(include),
        rules={
            rule: p if p is None else parse_pattern(p)
            for rule, p in _by_rule(rules, "rules").items()
        },
        axes=_by_rule(axes, "axes"),
    )
    check_rules((*choice.exclude, *(choice.include or ()), *choice.rules, *choice.axes), leaves)
    shapes = {name: tuple(getattr(leaf, "shape", ())) for name, leaf in leaves.items()}
    planned = {name: choice.plan_leaf(name, leaf, shapes) for name, leaf in leaves.items()}
    choice.check_rules_apply(planned)
    # After the rules, so that excluded leaves need not divide.
    planned = _settle_indivisible(planned, on_indivisible)
    _check_floating(planned, leaves)
    if not any(isinstance(leaf, LeafPlan) for leaf in planned.values()):
        raise ValueError(
            "no leaf becomes sparse:\n"
            + "\n".join(
                f"  {name} {leaf.shape}: {leaf.reason}"
                for name, leaf in planned.items()
                if isinstance(leaf, DenseLeaf)
            )
        )
    return Plan(tuple(planned.items()), score)


@dataclass(frozen=True)
class _Selection:
    """What the user asked for, parsed."""

    pattern: Pattern
    exclude: tuple[str, ...]
    include: tuple[str, ...] | None
    rules: dict[str, Pattern | None]
    axes: dict[str, GivenAxes]

    def plan_leaf(self, name: str, leaf: Any, shapes: Mapping[str, Shape]) -> LeafPlan | DenseLeaf:
        shape = shapes[name]
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return DenseLeaf(shape, "not an array")
        # The layout's reason comes first: a bias is listed as a bias even if a rule excludes it.
        axes = self._axes(name, shapes)
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
        if pattern.needs_taps and axes.taps is None:
            raise ValueError(
                f"{name} of shape {shape} cannot take {pattern}: the shape does not determine "
                "which axes are outputs, which are the taps of a filter, and which are a stack of "
                f"layers. Pass axes={{{name + '$'!r}: nmjax.Axes(reduction=..., output=..., "
                "taps=...)}, exclude the leaf, or give it another pattern in rules="
            )
        reduction, output, taps = pattern.place(axes)
        return LeafPlan(pattern, reduction, output, shape, taps or ())

    def _axes(self, name: str, shapes: Mapping[str, Shape]) -> Axes | str:
        rule = first_match(self.axes, name)
        if rule is None:
            # `layout` gets all shapes, because the names of siblings distinguish some layers.
            return layout(name, shapes)
        try:
            return given_axes(self.axes[rule], len(shapes[name]))
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"axes={{{rule!r}: {self.axes[rule]}}} does not fit {name} of shape "
                f"{shapes[name]}: {error}"
            ) from error

    def check_rules_apply(self, planned: Mapping[str, LeafPlan | DenseLeaf]) -> None:
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


def _settle_indivisible(
    planned: Mapping[str, LeafPlan | DenseLeaf], on_indivisible: str
) -> dict[str, LeafPlan | DenseLeaf]:
    """Leaves indivisible leaves dense, or raises one ValueError that lists all of them."""
    complaints = {
        name: leaf.misfit
        for name, leaf in planned.items()
        if isinstance(leaf, LeafPlan) and leaf.misfit is not None
    }
    if complaints and on_indivisible == "error":
        raise ValueError(
            "these leaves do not divide into whole groups or blocks:\n"
            + "\n".join(
                f"  {name} {planned[name].shape}: {complaint} (axes {planned[name].span})"  # type: ignore[union-attr]
                for name, complaint in complaints.items()
            )
            + '\nList them in exclude=, or pass on_indivisible="dense" to leave them dense.'
        )
    return {
        name: DenseLeaf(leaf.shape, complaints[name]) if name in complaints else leaf
        for name, leaf in planned.items()
    }


def _check_floating(planned: Mapping[str, LeafPlan | DenseLeaf], leaves: Mapping[str, Any]) -> None:
    wrong = {
        name: leaves[name].dtype
        for name, leaf in planned.items()
        if isinstance(leaf, LeafPlan) and not jnp.issubdtype(leaves[name].dtype, jnp.floating)
    }
    if wrong:
        raise TypeError(
            "only weights with a floating dtype can become sparse, but\n"
            + "\n".join(f"  {name} has dtype {dtype}" for name, dtype in wrong.items())
            + "\nList them in exclude=, or convert them."
        )


def _by_rule(given: Mapping[str, Any] | None, argument: str) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{argument}= must map path rules to values, got {given!r}")
    return dict(given or {})


def _left_dense(rule: str | None) -> str:
    return f"left dense by the rule {rule!r}"


def _row(name: str, leaf: LeafPlan | DenseLeaf) -> Row:
    shape = "x".join(map(str, leaf.shape)) or "scalar"
    weights = math.prod(leaf.shape)
    if isinstance(leaf, DenseLeaf):
        return (name, shape, "dense", "", f"{weights:,}", f"{weights:,}", leaf.reason)
    return (name, shape, str(leaf.pattern), leaf.span, f"{weights:,}", f"{leaf.kept:,}", "")
