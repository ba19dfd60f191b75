"""Layouts: which axes of a weight the matmul sums over, judging by the leaf's name and shape.

Libraries name and shape the same matrix differently. nmjax knows these layouts:

| leaf | library | shape | reduction axes |
|---|---|---|---|
| `kernel`, `w` | Flax, NNX, Haiku: Dense | (in, out) | -2 |
| `kernel`, `w` | Flax, NNX, Haiku: Conv | (*spatial, in, out) | -2, at each tap |
| `query/kernel`, `key/kernel`, `value/kernel` | Flax attention | (in, heads, head) | -3 |
| `out/kernel` | Flax attention | (heads, head, out) | -3 and -2 together |
| `kernel` | Flax: DenseGeneral with a bias of several axes | (*in, *out) | all of in together |
| `weight` | Equinox, PyTorch: Linear | (out, in) | -1 |
| `weight` | Equinox, PyTorch: Conv2d | (out, in, height, width) | -3, at each tap |
| any other name | plain JAX, `x @ w` | (in, out) | -2 |

Axes are negative, so additional leading axes (`nn.scan`, a stack of seeds) make no difference.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

Shape = tuple[int, ...]

_FLAX_WEIGHTS = ("kernel", "w")
_PROJECTIONS_IN = ("query", "key", "value")
_BIASES = ("bias", "b")
_NORMS = ("scale", "gamma", "beta", "offset", "mean", "var")


class Axes(NamedTuple):
    """The roles of a weight's axes, as negative numbers. Axes in none of the fields are a stack.

    Attributes:
      reduction: axes that the matmul sums over, in order.
      output: axes that the matmul keeps, in order.
      taps: spatial axes of a convolution, in order; None if the shape does not determine whether
        axes are taps or a stack of layers.
    """

    reduction: tuple[int, ...]
    output: tuple[int, ...]
    taps: tuple[int, ...] | None = ()


class Unknown(NamedTuple):
    """Why the axes of a leaf are not certain."""

    reason: str


GivenAxes = int | tuple[int, ...] | Axes

DENSE = Axes((-2,), (-1,))
CONV_2D = Axes((-2,), (-1,), (-4, -3))
ATTENTION_IN = Axes((-3,), (-2, -1))
ATTENTION_OUT = Axes((-3, -2), (-1,))
LINEAR_OUT_IN = Axes((-1,), (-2,))
CONV_OUT_IN = Axes((-3,), (-4,), (-2, -1))


def layout(name: str, shapes: Mapping[str, Shape]) -> Axes | str:
    """The axes of the leaf `name`, or the reason why it stays dense.

    Args:
      name: the leaf's name, such as `"encoder/attention/query/kernel"`.
      shapes: shapes of all leaves by name. Siblings distinguish attention from convolution.

    >>> layout("Conv_0/kernel", {"Conv_0/kernel": (3, 3, 64, 128)})
    Axes(reduction=(-2,), output=(-1,), taps=(-4, -3))
    >>> layout("Conv_0/kernel", {"Conv_0/kernel": (3, 3, 1, 128)})
    'one input per output (depthwise)'
    """
    shape = shapes[name]
    parent, _, leaf = name.lower().rpartition("/")
    reason = _no_weight(parent, leaf, shape)
    if reason is not None:
        return reason
    axes = _attention(name, shapes) or _by_name(name, shapes)
    if axes is None:
        return f'unknown axes; pass axes={{"{name}$": ...}}'
    if size_along(shape, axes.reduction) == 1:
        return "one input per output (depthwise)"
    return axes


def layouts(shapes: Mapping[str, Shape]) -> dict[str, Axes | str | Unknown]:
    """The axes of every leaf."""
    return {name: layout(name, shapes) for name in shapes}


def given_axes(given: GivenAxes, ndim: int) -> Axes:
    """Completes and checks the axes that a user gives for a weight with `ndim` axes.

    Args:
      given: `Axes`, or the reduction axes; all other axes then count as outputs. With more than two
        axes, that does not say which are taps and which are a stack.
      ndim: number of axes of the weight.

    Raises:
      TypeError: an axis is not an integer.
      ValueError: an axis is out of range or given twice.

    >>> given_axes(0, 2)
    Axes(reduction=(-2,), output=(-1,), taps=())
    """
    spans = given if isinstance(given, Axes) else Axes(given, ())  # type: ignore[arg-type]
    reduction, output, taps = (_negative(span, ndim) for span in spans)
    named = (*reduction, *output, *taps)
    if not reduction:
        raise TypeError("the reduction axes must be one or more integers, got none")
    if len(set(named)) != len(named):
        raise ValueError("an axis is given twice")
    if isinstance(given, Axes):
        return Axes(reduction, output, taps)
    others = tuple(axis for axis in range(-ndim, 0) if axis not in reduction)
    return Axes(reduction, others, () if ndim == 2 else None)


def _negative(given: Any, ndim: int) -> tuple[int, ...]:
    axes = given if isinstance(given, tuple | list) else (given,)
    if any(isinstance(axis, bool) or not hasattr(axis, "__index__") for axis in axes):
        raise TypeError(f"axes must be one or more integers, got {given!r}")
    if not all(-ndim <= axis < ndim for axis in axes):
        raise ValueError(f"the weight has {ndim} axes")
    return tuple(operator.index(axis) - (ndim if axis >= 0 else 0) for axis in axes)


def size_along(shape: Shape, axes: tuple[int, ...]) -> int:
    """The product of the sizes of `axes`."""
    return math.prod(shape[axis] for axis in axes)


def _no_weight(parent: str, leaf: str, shape: Shape) -> str | None:
    """Why a leaf that is not a matrix stays dense, or None."""
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


def _by_name(name: str, shapes: Mapping[str, Shape]) -> Axes | None:
    leaf, ndim = name.lower().rpartition("/")[-1], len(shapes[name])
    if leaf in _FLAX_WEIGHTS:
        return _several_outputs(name, shapes) or DENSE._replace(taps=_taps(name, shapes))
    if leaf.startswith("weight"):
        return {2: LINEAR_OUT_IN, 4: CONV_OUT_IN}.get(ndim)
    return DENSE if ndim == 2 else None


def _taps(name: str, shapes: Mapping[str, Shape]) -> tuple[int, ...] | None:
    """Which axes before (in, out) are the taps of a convolution, and not a stack of layers."""
    # The bias has the axes of a stack too, but no taps. Without a bias, four axes are taken for a
    # 2-D convolution, and three or five could be either.
    shape = shapes[name]
    stacked = len(_bias(name, shapes)) - 1
    if 0 <= stacked <= len(shape) - 2:
        return tuple(range(stacked - len(shape), -2))
    return {2: (), 4: CONV_2D.taps}.get(len(shape))


def _several_outputs(name: str, shapes: Mapping[str, Shape]) -> Axes | None:
    """The axes of a layer whose bias shows that its outputs fill several axes; None for others."""
    # After the axes of a stack, which both have, the bias has the last axes of the kernel.
    shape, bias = shapes[name], _bias(name, shapes)
    if bias == (*shape[: len(bias) - 1], shape[-1]):  # A stack of layers with one output axis.
        return None
    for stacked in range(len(bias) - 1):
        outputs = len(bias) - stacked
        if stacked + outputs < len(shape) and bias == (*shape[:stacked], *shape[-outputs:]):
            reduction = tuple(range(stacked - len(shape), -outputs))
            return Axes(reduction, tuple(range(-outputs, 0)))
    return None


def _bias(name: str, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of the bias beside a kernel; empty if there is none."""
    parent = name.rpartition("/")[0]
    names = ("/".join(filter(None, (parent, bias))) for bias in _BIASES)
    return next((shapes[bias] for bias in names if bias in shapes), ())


def _attention(name: str, shapes: Mapping[str, Shape]) -> Axes | None:
    """The axes of a multi-head projection, or None if `name` is not one."""
    # A 1-D convolution has as many axes as a projection, and a 2-D one as many as a scanned
    # projection. In attention the heads of `query` and `out` agree.
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
