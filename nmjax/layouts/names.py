"""What the names of leaves and modules say about a layer."""

from __future__ import annotations

import re
from typing import NamedTuple

IN_OUT = ("kernel", "w")
OUT_IN = ("weight",)

# Suffixes that PyTorch's weight normalization, spectral normalization, and pruning append.
_SUFFIXED = re.compile(
    r"(?P<leaf>weight|weight_[ih][hr]\w*|in_proj_weight)_(?P<part>orig|g|v|u|mask)"
)
_ROLES = {"orig": "original", "v": "direction", "g": "gain", "u": "vector", "mask": "mask"}
_PARAMETRIZATIONS = {"original": "original", "original0": "gain", "original1": "direction"}

# A matrix `B` belongs to a state-space model.
_BIAS = re.compile(r"b|(?i:bias.*|.*bias)")
_NORM = re.compile(r"gamma|beta|offset|(.*_)?(mean|var|variance)|.*scale")
_NORM_MODULE = re.compile(r".*norm.*|(.*_)?(ln|bn|gn|rms)(_?[0-9f])?")
_ADAPTER = re.compile(r"(.*_)?lora_?(embedding_)?[ab]")
_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?")
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_TABLE = re.compile(
    r".*embed.*|emb|.*_emb|wte|wpe|shared|pos|(pos_|position)(?!_?wise).*|relative_.*bias.*"
    r"|.*bias_table|rel_pos.*|.*tokens|.*lookup.*|.*codebooks?|(.*_)?tables?"
)
# Layers only. A leaf with such a name may be a matrix, as `E` in Linformer.
_TABLE_LAYER = re.compile(
    r"(.*_)?(tok|token|word|char|vocab|vocabulary|user|item|entity|relation|code|segment|speaker)s?"
    r"(_ids?|_types?)?|(.*_)?pe|rel|relative_positions?|e"
)
# Linear layers near embeddings, and those that undo an embedding.
_NO_TABLE = re.compile(
    r"patch(es)?_embed|unembed|proj|linear|dense|conv|ff|fc|mlp|attn|attention(?!_bias)|head|layer|map"
    r"|(^|_)(out|output|to|w|kernel)(_|$)"
)
_CONV_MODULE = re.compile(r"conv|downsample")
_NO_CONV = re.compile(
    r"trans|deconv|depth|dw|sep|local|einsum|(^|[_\d])up|up(conv|sampl)|linear|dense"
    r"|inv|dconv|t_?conv|conv_?tr?($|[_\d])"
)


class Leaf(NamedTuple):
    """A leaf's name, taken apart.

    Attributes:
      module: components of the name of the layer.
      leaf: what the layer calls the weight.
      part: what this leaf holds of the weight: all of it (""), or "direction", "gain", "mask", ...
    """

    module: tuple[str, ...]
    leaf: str
    part: str = ""

    @property
    def own_name(self) -> str:
        """The name of the layer in lower case, without the numbers that containers add."""
        return next((name.lower() for name in reversed(self.module) if not name.isdigit()), "")

    @property
    def parent(self) -> str:
        """The last component of the layer's name, in lower case."""
        return self.module[-1].lower() if self.module else ""


def parse_name(name: str) -> Leaf:
    """Takes a name apart; dots separate components like slashes.

    >>> parse_name("encoder.fc1.weight")
    Leaf(module=('encoder', 'fc1'), leaf='weight', part='')
    >>> parse_name("fc/parametrizations/weight/original1")
    Leaf(module=('fc',), leaf='weight', part='direction')
    """
    *module, leaf = re.split(r"[./]", name)
    if leaf == "value" and module:  # The box of an NNX state that was read from a file.
        *module, leaf = module
    if len(module) > 1 and module[-2] == "parametrizations":
        return Leaf(tuple(module[:-2]), module[-1], _PARAMETRIZATIONS.get(leaf, "other"))
    if suffixed := _SUFFIXED.fullmatch(leaf):
        return Leaf(tuple(module), suffixed["leaf"], _ROLES[suffixed["part"]])
    return Leaf(tuple(module), leaf)


def is_bias(leaf: Leaf) -> bool:
    """Whether the leaf is a bias."""
    return _BIAS.fullmatch(leaf.leaf) is not None


def is_norm(leaf: Leaf) -> bool:
    """Whether the leaf is a scale, an offset, or a running statistic."""
    return _NORM.fullmatch(leaf.leaf.lower()) is not None


def in_norm_module(leaf: Leaf) -> bool:
    """Whether the leaf's layer is called like a normalization."""
    return _NORM_MODULE.fullmatch(leaf.parent) is not None


def in_adapter(leaf: Leaf) -> bool:
    """Whether the leaf is a factor of a low-rank update."""
    return any(_ADAPTER.fullmatch(name.lower()) for name in (*leaf.module, leaf.leaf))


def is_out_in_matrix(leaf: Leaf) -> bool:
    """Whether PyTorch and Equinox keep only (out, in) matrices under this name."""
    return leaf.leaf in _ATTENTION_WEIGHTS or _RECURRENT.fullmatch(leaf.leaf) is not None


def is_called_table(name: str) -> bool:
    """Whether a layer or a leaf is called like a look-up table."""
    return _TABLE.fullmatch(_unnumbered(name)) is not None


def is_table_layer(name: str) -> bool:
    """Whether a layer that has no bias is called like a look-up table."""
    return is_called_table(name) or _TABLE_LAYER.fullmatch(_unnumbered(name)) is not None


def is_called_matrix(name: str) -> bool:
    """Whether a layer or a leaf is called like something that multiplies."""
    return _NO_TABLE.search(name.lower()) is not None


def is_named_by_flax(leaf: Leaf) -> bool:
    """Whether linen named the leaf's layer after its class, a convolution."""
    return bool(leaf.module) and re.fullmatch(r"Conv_\d+", leaf.module[-1]) is not None


def is_called_conv(leaf: Leaf) -> bool:
    """Whether the leaf's layer is called like a convolution that is not transposed or depthwise."""
    if leaf.own_name in ("proj", "projection"):
        return any("patch_embed" in name.lower() for name in leaf.module[-2:-1])
    name = leaf.own_name
    is_conv = _CONV_MODULE.search(name) or "patch_embed" in name
    return bool(is_conv) and _NO_CONV.search(name) is None


def _unnumbered(name: str) -> str:
    return re.sub(r"_?\d+$", "", name.lower())
