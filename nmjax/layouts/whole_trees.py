"""Reads the layouts of a whole tree off its names and shapes, where they are certain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from nmjax.layouts.attention import attention_projection
from nmjax.layouts.axes import Axes, Shape, Unknown, size_along
from nmjax.layouts.gpt2 import gpt2_layouts
from nmjax.layouts.layers import Judgment, judge_in_out, judge_out_in
from nmjax.layouts.names import IN_OUT, OUT_IN, Leaf, parse_name
from nmjax.layouts.optimizer_states import optimizer_leaves
from nmjax.layouts.readings import Outcome
from nmjax.layouts.reasons import why_dense
from nmjax.layouts.siblings import Siblings


class _Contradiction(NamedTuple):
    name: str
    shape: Shape


def layouts(
    shapes: Mapping[str, Shape], classes: Mapping[str, str] | None = None
) -> dict[str, Outcome]:
    """Reads the axes of each leaf off names and shapes, as the libraries document their layers.

    Args:
      shapes: shapes of all leaves by name. Biases and other siblings show which layer a leaf
        belongs to.
      classes: name of an Equinox module -> its class in `equinox.nn`; empty for a class from
        elsewhere, which may keep its axes in any order.

    Returns:
      For each leaf its axes, or the reason why it stays dense, or `Unknown` with a reason: the
      name and the shapes fit several layers that sum over different axes, or none.

    >>> layouts({"Conv_0/kernel": (3, 3, 64, 128), "Conv_0/bias": (128,)})["Conv_0/kernel"]
    Axes(reduction=(-2,), output=(-1,), taps=(-4, -3))
    >>> layouts({"fc.weight": (10, 64), "fc.bias": (10,)})["fc.weight"]
    Axes(reduction=(-1,), output=(-2,), taps=())
    """
    states = optimizer_leaves(shapes)
    leaves = {name: parse_name(name) for name in shapes if name not in states}
    by_leaf = {leaf: tuple(shapes[name]) for name, leaf in leaves.items()}
    siblings = Siblings(by_leaf)
    gpt2 = gpt2_layouts(by_leaf, siblings)
    judgments = {
        name: _judge(name, leaf, tuple(shapes[name]), siblings, classes or {}, gpt2)
        for name, leaf in leaves.items()
    }
    # If one layer of a tree is stored the other way round, then those that fit both ways may be
    # stored the other way round, too.
    contradictions = {
        leaves[name].leaf: _Contradiction(name, shapes[name])
        for name, judgment in judgments.items()
        if judgment.contradicts
    }
    found = {
        name: judgment.outcome
        if judgment.corroborated or leaves[name].leaf not in contradictions or judgment.contradicts
        else _doubted(*contradictions[leaves[name].leaf])
        for name, judgment in judgments.items()
    }
    transposed = [name for name, judgment in judgments.items() if judgment.is_transposed]
    for name, judgment in judgments.items():
        if judgment.by_name and transposed:
            found[name] = Unknown(
                f"{transposed[0]} is a transposed convolution, and only the name or the single "
                "tap of this layer says that it is not"
            )
    return {name: found.get(name, "optimizer state") for name in shapes}


def _judge(
    name: str,
    leaf: Leaf,
    shape: Shape,
    siblings: Siblings,
    classes: Mapping[str, str],
    gpt2: Mapping[Leaf, Axes | Unknown],
) -> Judgment:
    in_module = classes.get(name.rpartition("/")[0])
    judgment = _judge_documented(leaf, shape, siblings, in_module or None, gpt2)
    axes = judgment.outcome
    if in_module != "" or not isinstance(axes, Axes):
        return judgment
    if _is_settled_by_bias(shape, siblings.bias(leaf), axes):
        return judgment
    reason = "an Equinox module of your own may keep its axes in any order, and no bias shows which"
    return Judgment(Unknown(reason))


def _judge_documented(
    leaf: Leaf,
    shape: Shape,
    siblings: Siblings,
    layer: str | None,
    gpt2: Mapping[Leaf, Axes | Unknown],
) -> Judgment:
    outcome: Outcome | None = why_dense(leaf, shape, siblings, layer)
    if outcome is None and layer is None:
        outcome = gpt2.get(leaf)
    if outcome is not None:
        return Judgment(outcome, corroborated=True)
    if leaf.leaf in IN_OUT:
        return judge_in_out(leaf, shape, siblings, attention_projection(leaf, siblings))
    if leaf.leaf in OUT_IN:
        return judge_out_in(leaf, shape, siblings, layer)
    # `why_dense` lets no others through than the matrices of attention and recurrent layers.
    return Judgment(Axes((-1,), (-2,)), corroborated=True)


def _is_settled_by_bias(shape: Shape, bias: Shape, axes: Axes) -> bool:
    """Whether the bias alone shows the axes of a matrix: it has the length of the outputs only."""
    is_square = size_along(shape, axes.reduction) == size_along(shape, axes.output)
    fits = bias[-1:] == (shape[axes.output[-1]],)
    return fits and not is_square and axes.taps == ()


def _doubted(name: str, shape: Shape) -> Unknown:
    return Unknown(
        f"nothing says which axis is the input, and {name} of shape {shape} contradicts the usual "
        "order"
    )
