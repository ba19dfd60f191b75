"""GPT-2's layers, which are stored both ways round under the same names.

transformers' `Conv1D` keeps its `weight` as (in, out), nanoGPT's `nn.Linear` as (out, in), and
transformers' Flax GPT-2 keeps its `kernel` as (out, in).
"""

from __future__ import annotations

from collections.abc import Mapping

from nmjax.layouts.axes import Axes, Shape, Unknown
from nmjax.layouts.names import IN_OUT, OUT_IN, Leaf
from nmjax.layouts.siblings import Siblings

_LAYERS = ("c_attn", "c_fc", "c_proj", "q_attn")
# Outputs for each input: query, key, and value; and the hidden units.
_WIDENING = {"c_attn": 3, "c_fc": 4}
_ORDERS = {"in, out": Axes((-2,), (-1,)), "out, in": Axes((-1,), (-2,))}


def gpt2_layouts(leaves: Mapping[Leaf, Shape], siblings: Siblings) -> dict[Leaf, Axes | Unknown]:
    """The axes of all layers with GPT-2's names, which one model stores the same way round."""
    found: dict[Leaf, Axes | Unknown] = {}
    for name in (*IN_OUT, *OUT_IN):
        group = {
            leaf: shape
            for leaf, shape in leaves.items()
            if leaf.leaf == name and leaf.parent in _LAYERS and len(shape) > 1 and not leaf.part
        }
        votes = {_order(leaf, shape, siblings.bias(leaf)) for leaf, shape in group.items()} - {""}
        for leaf, shape in group.items():
            found[leaf] = _decide(votes, shape)
    return found


def _decide(votes: set[str], shape: Shape) -> Axes | Unknown:
    if len(shape) > 2:
        return Unknown("a stack of GPT-2's layers may be (stack, in, out) or (stack, out, in)")
    if len(votes) == 1 and votes <= _ORDERS.keys():
        return _ORDERS[next(iter(votes))]
    problem = "contradicts itself" if votes else "shows nowhere"
    return Unknown(f"GPT-2's layers are stored as (in, out) or as (out, in); the tree {problem}")


def _order(leaf: Leaf, shape: Shape, bias: Shape) -> str:
    """Which order the shape of a layer shows; empty if it fits both."""
    if len(shape) != 2 or (not bias and leaf.parent not in _WIDENING):
        return ""
    rows, columns = shape
    wide = bias or (max(shape),)
    widening = _WIDENING.get(leaf.parent, 0)
    if not bias and max(shape) != widening * min(shape):
        return ""
    if wide not in ((rows,), (columns,)):
        return "neither"
    if rows == columns:
        return ""
    return "in, out" if wide == (columns,) else "out, in"
