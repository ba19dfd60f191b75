"""Which axes of a leaf are summed over, judged by its name and shape.

Libraries name and shape the same matrix differently. What is known here:

| leaf | library | shape | reduction axes |
|---|---|---|---|
| `kernel`, `w` | Flax, NNX, Haiku: Dense | (in, out) | -2 |
| `kernel`, `w` | Flax, NNX, Haiku: Conv | (*spatial, in, out) | -2, at each tap |
| `query/kernel`, `key/kernel`, `value/kernel` | Flax attention | (in, heads, head) | -3 |
| `out/kernel` | Flax attention | (heads, head, out) | -3 and -2 together |
| `weight` | Equinox, PyTorch: Linear | (out, in) | -1 |
| `weight` | Equinox, PyTorch: Conv2d | (out, in, height, width) | -3, at each tap |
| any other name | plain JAX, `x @ w` | (in, out) | -2 |

Axes are negative, so axes in front (`nn.scan`, a stack of seeds) change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

Shape = tuple[int, ...]

_FLAX_WEIGHTS = ("kernel", "w")
_PROJECTIONS_IN = ("query", "key", "value")
_BIASES = ("bias", "b")
_NORMS = ("scale", "gamma", "beta", "offset", "mean", "var")


class Axes(NamedTuple):
    """Negative axes of a weight: those its matmul sums over, in order, and those it keeps."""

    reduction: tuple[int, ...]
    output: tuple[int, ...]


DENSE = Axes((-2,), (-1,))
ATTENTION_IN = Axes((-3,), (-2, -1))
ATTENTION_OUT = Axes((-3, -2), (-1,))
LINEAR_OUT_IN = Axes((-1,), (-2,))
CONV_OUT_IN = Axes((-3,), (-4,))


def layout(name: str, shapes: Mapping[str, Shape]) -> Axes | str:
    """The axes of the leaf `name`, or why it is no weight to make sparse.

    Args:
      name: the leaf's name, such as `"encoder/attention/query/kernel"`.
      shapes: the shapes of all leaves by name; siblings tell attention from convolution.

    >>> layout("Conv_0/kernel", {"Conv_0/kernel": (3, 3, 64, 128)})
    Axes(reduction=(-2,), output=(-1,))
    >>> layout("Conv_0/kernel", {"Conv_0/kernel": (3, 3, 1, 128)})
    'one input per output (depthwise)'
    """
    shape = shapes[name]
    parent, _, leaf = name.lower().rpartition("/")
    reason = _no_weight(parent, leaf, shape)
    if reason is not None:
        return reason
    axes = _attention(name, shapes) or _by_name(leaf, len(shape))
    if axes is None:
        return f'unknown axes; name them: axes={{"{name}$": ...}}'
    if reduction_size(shape, axes.reduction) == 1:
        return "one input per output (depthwise)"
    return axes


def filter_axes(axes: Axes, shape: Shape) -> Axes | None:
    """Axes that take a whole convolution filter together, in the order (in, row, column).

    Returns:
      None where the shape does not tell which axes are spatial.
    """
    if len(shape) == 4 and axes == DENSE:
        return Axes((-2, -4, -3), (-1,))
    if len(shape) == 4 and axes == CONV_OUT_IN:
        return Axes((-3, -2, -1), (-4,))
    return axes if len(shape) == 2 or axes in (ATTENTION_IN, ATTENTION_OUT) else None


def reduction_size(shape: Shape, axes: tuple[int, ...]) -> int:
    """Number of weights that one output sums over along `axes`."""
    return math.prod(shape[axis] for axis in axes)


def _no_weight(parent: str, leaf: str, shape: Shape) -> str | None:
    """Why a leaf that is no matrix stays dense, or None."""
    if leaf in _BIASES or leaf.endswith("bias"):
        return "bias"
    if leaf in _NORMS or leaf.endswith("scale"):
        return "normalization"
    if len(shape) < 2:
        return f"{len(shape)}-D"
    if leaf == "weight" and "norm" in parent.rpartition("/")[-1]:
        return "normalization"
    if "embed" in leaf or (leaf == "weight" and len(shape) == 2 and "embed" in parent):
        return "embedding"
    return None


def _by_name(leaf: str, ndim: int) -> Axes | None:
    if leaf in _FLAX_WEIGHTS:
        return DENSE
    if leaf.startswith("weight"):
        return {2: LINEAR_OUT_IN, 4: CONV_OUT_IN}.get(ndim)
    return DENSE if ndim == 2 else None


def _attention(name: str, shapes: Mapping[str, Shape]) -> Axes | None:
    """The axes of a multi-head projection, or None where `name` is none.

    A 1-D convolution has as many axes as a projection, and a 2-D one as many as a scanned
    projection; what tells them apart is that the heads of `query` and of `out` agree.
    """
    module, _, leaf = name.rpartition("/")
    parent, _, role = module.rpartition("/")
    if leaf not in _FLAX_WEIGHTS or role not in (*_PROJECTIONS_IN, "out"):
        return None

    def kernel(projection: str) -> Shape:
        return shapes.get("/".join(filter(None, (parent, projection, leaf))), ())

    ins = [kernel(projection)[-2:] for projection in _PROJECTIONS_IN if len(kernel(projection)) > 2]
    heads_agree = kernel("out")[-3:-1] in ins
    if role == "out":
        return ATTENTION_OUT if len(shapes[name]) > 2 and heads_agree else None
    ndim, has_out = len(shapes[name]), len(kernel("out")) > 2
    is_projection = ndim > 2 and (heads_agree or (ndim == 3 and not has_out))
    return ATTENTION_IN if is_projection else None
