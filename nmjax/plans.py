"""Which leaf of a parameter tree takes which pattern along which axes, and why others stay dense.

A plan is made once, from names and shapes alone, and is then static data: every mask, gradient
term, measure and file of one model reads it.
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
    """A leaf that stays dense: its shape, and why."""

    shape: Shape
    reason: str


@jax.tree_util.register_static
@dataclass(frozen=True)
class Plan(Mapping[str, LeafPlan]):
    """A mapping from leaf name to `LeafPlan`, over the planned leaves only.

    Static and hashable: close over it, or pass it to a jitted function like any other argument.
    `print(plan)` shows a table of all leaves, and a notebook shows it as HTML.

    Attributes:
      leaves: every leaf of the tree in tree order, as pairs of name and plan.
      score: what ranks the weights of a group.
    """

    leaves: tuple[tuple[str, LeafPlan | DenseLeaf], ...]
    score: Score = magnitude

    @cached_property
    def _sparse(self) -> dict[str, LeafPlan]:
        return {name: leaf for name, leaf in self.leaves if isinstance(leaf, LeafPlan)}

    @property
    def dense(self) -> dict[str, str]:
        """Why each leaf that is not planned stays dense, by name."""
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
            f"{total:,} parameters. {kept:,} parameters stay ({kept / max(total, 1):.1%})."
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
    """Decides which leaves of `params` become sparse, how, and along which axes.

    Path rules are regular expressions, searched for anywhere in a leaf's name (`"a/b/kernel"`).
    Biases, normalizations, embeddings and depthwise convolutions stay dense by themselves.

    Args:
      params: parameters, or anything with the same tree, shapes and dtypes (`jax.eval_shape`):
        dicts, FrozenDicts, dataclasses, boxed Flax leaves, NNX states, Equinox modules.
      pattern: what a leaf takes unless `rules` says otherwise, such as `"2:4"`, `NM(2, 4)` or
        `"1x16@0.5"`.
      exclude: leaves to leave dense.
      include: where given, only these leaves can become sparse.
      rules: path rule -> the pattern of those leaves, or None to leave them dense. The first
        rule that matches counts.
      axes: path rule -> the reduction axes of those leaves, for layouts that names and shapes do
        not tell; whatever such a rule matches counts as a weight. All other axes count as outputs;
        `nmjax.Axes` names outputs and taps too, which blocks need to know beyond two axes.
      on_indivisible: what happens to a leaf whose inputs m does not divide, or for blocks whose
        outputs N does not divide: `"error"`, or `"dense"` to leave it dense with that reason.
      score: importance of each weight, a function of the weight array; that of a block is the sum
        over its weights, so by default its L1 norm. Pass a named function, not a lambda made anew
        each time: the plan's equality, and so the jit cache, goes by it.

    Raises:
      TypeError: a leaf to be made sparse is not of a floating dtype; a pattern, a path rule or an
        axis of the wrong type.
      ValueError: no leaves at all; a pattern does not parse; a path rule is no regular expression
        or matches no leaf; one of `rules` is overruled on every leaf that it matches; axes that a
        leaf does not have, or that a pattern needs to know and the shape does not tell; a size that
        m or N does not divide (all such leaves are named); no leaf becomes sparse.

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
        raise ValueError("the parameter tree has no leaves, so there is nothing to plan")
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
                f"{name} of shape {shape} cannot take {pattern}: its shape does not tell which "
                "axes are outputs, which are a filter's taps and which a stack of layers. Name "
                f"them: axes={{{name + '$'!r}: nmjax.Axes(reduction=..., output=..., taps=...)}}; "
                "or exclude the leaf, or give it another pattern in rules="
            )
        reduction, output, taps = pattern.place(axes)
        return LeafPlan(pattern, reduction, output, shape, taps or ())

    def _axes(self, name: str, shapes: Mapping[str, Shape]) -> Axes | str:
        rule = first_match(self.axes, name)
        if rule is None:
            return layout(name, shapes)
        try:
            return given_axes(self.axes[rule], len(shapes[name]))
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"axes={{{rule!r}: {self.axes[rule]}}} does not fit {name} of shape "
                f"{shapes[name]}: {error}"
            ) from error

    def check_rules_apply(self, planned: Mapping[str, LeafPlan | DenseLeaf]) -> None:
        """Raises ValueError if no leaf comes out as one of `rules` wants it."""
        for rule, pattern in self.rules.items():
            matched = {name: leaf for name, leaf in planned.items() if re.search(rule, name)}
            sparse = [name for name, leaf in matched.items() if isinstance(leaf, LeafPlan)]
            if pattern is None:
                left_dense = (DenseLeaf(leaf.shape, _left_dense(rule)) for leaf in matched.values())
                heeded = not sparse or any(leaf in matched.values() for leaf in left_dense)
            else:
                heeded = any(first_match(self.rules, name) == rule for name in sparse)
            if heeded:
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
    """Leaves dense, or refuses all at once, the leaves whose groups would straddle."""
    complaints = {
        name: leaf.misfit
        for name, leaf in planned.items()
        if isinstance(leaf, LeafPlan) and leaf.misfit is not None
    }
    if complaints and on_indivisible == "error":
        raise ValueError(
            "groups may not straddle rows, nor blocks inputs, as they would in:\n"
            + "\n".join(
                f"  {name} {planned[name].shape}: {complaint} (axes {planned[name].span})"  # type: ignore[union-attr]
                for name, complaint in complaints.items()
            )
            + '\nName them in exclude=, or pass on_indivisible="dense" to leave them dense.'
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
            "only weights of a floating dtype can be made sparse, but\n"
            + "\n".join(f"  {name} has dtype {dtype}" for name, dtype in wrong.items())
            + "\nName them in exclude=, or convert them."
        )


def _by_rule(given: Mapping[str, Any] | None, argument: str) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{argument}= is a mapping with path rules as keys, got {given!r}")
    return dict(given or {})


def _left_dense(rule: str | None) -> str:
    return f"left dense by the rule {rule!r}"


def _row(name: str, leaf: LeafPlan | DenseLeaf) -> Row:
    shape = "x".join(map(str, leaf.shape)) or "scalar"
    weights = math.prod(leaf.shape)
    if isinstance(leaf, DenseLeaf):
        return (name, shape, "dense", "", f"{weights:,}", f"{weights:,}", leaf.reason)
    return (name, shape, str(leaf.pattern), leaf.span, f"{weights:,}", f"{leaf.kept:,}", "")
