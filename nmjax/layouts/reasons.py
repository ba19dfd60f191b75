"""Why leaves that are not weights of a product stay dense."""

from __future__ import annotations

import re

from nmjax.layouts import names
from nmjax.layouts.axes import Shape, Unknown
from nmjax.layouts.names import IN_OUT, OUT_IN, Leaf
from nmjax.layouts.siblings import Siblings

# Classes of `equinox.nn` whose arrays no product sums over.
_BY_CLASS = {
    "Embedding": "embedding",
    "LayerNorm": "normalization",
    "GroupNorm": "normalization",
    "RMSNorm": "normalization",
    "BatchNorm": "normalization",
    "PReLU": "activation",
}
_TABLE_OR_MATRIX = Unknown("could be a look-up table or a matrix")
_INDICES = re.compile(r"(.*_)?(index|indices|ids|mask)")


def why_dense(
    leaf: Leaf, shape: Shape, siblings: Siblings, layer: str | None
) -> str | Unknown | None:
    """Why a leaf stays dense, or is unknown by its name alone; None for weights of products."""
    if leaf.part == "mask":
        return "mask"
    if names.is_bias(leaf):
        return "bias"
    if names.is_norm(leaf):
        return "normalization"
    if len(shape) < 2:
        return f"{len(shape)}-D"
    if names.in_adapter(leaf):
        return "low-rank adapter"
    if layer in _BY_CLASS:
        return _BY_CLASS[layer]
    if leaf.part and (outcome := _part_of_weight(leaf, siblings)) is not None:
        return outcome
    if leaf.leaf in OUT_IN:
        return _vector_or_table(leaf, shape, siblings, layer)
    if leaf.leaf in IN_OUT and not leaf.part:
        return None
    if names.is_out_in_matrix(leaf):
        return _recurrent_or_attention(leaf, shape, siblings)
    return _other(leaf, shape)


def _part_of_weight(leaf: Leaf, siblings: Siblings) -> str | Unknown | None:
    """None for a part with the weight's layout: an input meets the same entries in both."""
    gain, direction, mask, vector = (
        siblings.shape(leaf.module, leaf.leaf, part)
        for part in ("gain", "direction", "mask", "vector")
    )
    if leaf.part == "vector":
        return "vector of a spectral normalization"
    if leaf.part == "original":
        power_iteration = siblings.shape((*leaf.module, "parametrizations", leaf.leaf, "0"), "_u")
        if mask or vector or power_iteration:
            return None
        return Unknown("a parametrization derives the weight from this leaf")
    # The gain of a weight normalization has one number for each output.
    if gain and direction and sum(size != 1 for size in gain) < 2:
        return "gain of a weight normalization" if leaf.part == "gain" else None
    return Unknown("the weight is derived from this leaf and others")


def _vector_or_table(
    leaf: Leaf, shape: Shape, siblings: Siblings, layer: str | None
) -> str | Unknown | None:
    bias = siblings.bias(leaf)
    # A product's bias has fewer axes than its weight.
    if shape in (bias, siblings.shape(leaf.module, "running_mean")):
        return "normalization"
    if layer is not None or bias:
        return None
    if names.in_norm_module(leaf):
        if names.is_called_matrix(leaf.parent):
            return Unknown("could be a normalization or a matrix")
        return "normalization"
    if len(shape) != 2 or not names.is_table_layer(leaf.own_name):
        return None
    # The table may be in a list of layers, but a list may also have its name.
    return _table(leaf.own_name) if not leaf.parent.isdigit() else _TABLE_OR_MATRIX


def _table(name: str) -> str | Unknown:
    return _TABLE_OR_MATRIX if names.is_called_matrix(name) else "embedding"


def _recurrent_or_attention(leaf: Leaf, shape: Shape, siblings: Siblings) -> Unknown | None:
    if len(shape) > 2:
        return Unknown(f"a stack of matrices named {leaf.leaf} has no documented layout")
    bias = siblings.shape(leaf.module, leaf.leaf.replace("weight", "bias"))
    if bias and bias != shape[:1]:
        return Unknown(f"it should be (out, in), but the bias has shape {bias}")
    return None


def _other(leaf: Leaf, shape: Shape) -> str | Unknown:
    if sum(size != 1 for size in shape) < 2:
        return "1-D"
    if _INDICES.fullmatch(leaf.leaf.lower()):
        return "indices or mask"
    if names.is_called_table(leaf.leaf):
        return _table(leaf.leaf)
    return Unknown(f"no known layer has a weight named {leaf.leaf!r}")
