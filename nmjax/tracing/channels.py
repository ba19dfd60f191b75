"""Finds which axes of a network's leaves run along the same channels, from the traced network.

The channels of a hidden layer can be reordered if everything that reads or writes them is reordered
too: the filters that produce them, their normalization, the inputs of the next layers, and the
channels that they are added to. Each axis of each value in the traced program gets a label.
Operations tie labels together, or fix them if the order matters. An operation without a rule fixes
every label that it touches, so that no channel counts as free by mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nmjax.tracing.channel_order import Channels, LeafAxis
from nmjax.tracing.operations import ELEMENTWISE, MASKS, REDUCTIONS
from nmjax.tracing.program import read_trace, trace
from nmjax.tracing.walk import Reader, Times, shape_of

if TYPE_CHECKING:
    from jax.extend import core

Label = int
Labels = tuple[Label, ...]


def find_channels(forward: Callable[..., Any], variables: Any, *inputs: Any) -> list[Channels]:
    """Finds the channels of a network that can be reordered, for `nmjax.sort_channels`.

    Sort the channels of a trained network, then compute its masks and fine-tune. Sorting helps
    patterns whose blocks compete within the layer (`uniform=False`), because rows of small filters
    then drop more blocks. It hurts patterns whose rows all drop the same number: large filters then
    share their blocks with other large filters, and no longer decide alone which inputs to keep.

    Args:
      forward: the network's forward pass in evaluation, `forward(variables, *inputs)`; it is
        traced, not run.
      variables: every array that runs along channels, including running statistics; arrays or
        ShapeDtypeStructs.
      *inputs: the network's inputs. The order along their axes, and along those of the outputs, is
        fixed.

    Returns:
      One entry for each set of channels, in tree order. Its writers are the leaves whose products
      keep that axis. Sets without a writer are left out.

    >>> import jax.numpy as jnp
    >>> variables = {"first": jnp.ones((3, 8)), "second": jnp.ones((8, 2))}
    >>> forward = lambda variables, x: jnp.tanh(x @ variables["first"]) @ variables["second"]
    >>> find_channels(forward, variables, jnp.ones((1, 3)))
    [Channels(writers=(('first', -1),), followers=(('second', -2),))]
    """
    traced = trace(forward, variables, *inputs)
    labels = _LabelReader()
    arguments = [labels.fresh(shape_of(v)) for v in traced.jaxpr.invars]
    leaves = dict(zip(traced.names, arguments, strict=False))
    # The caller decides the order along the axes of inputs and outputs.
    labels.fix(*arguments[len(leaves) :])
    labels.fix(*labels.walk(traced.jaxpr, arguments))
    tied: dict[Label, list[LeafAxis]] = {}
    uses_of = read_trace(traced).uses
    for name, uses in uses_of.items():
        for i, label in enumerate(leaves[name]):
            if not labels.is_fixed(label) and uses.shape[i] > 1:  # One channel has one order.
                tied.setdefault(labels.root(label), []).append((name, i - len(uses.shape)))
    written = {(name, axis) for name, uses in uses_of.items() for axis in uses.output}
    found = [
        Channels(
            tuple(axis for axis in axes if axis in written),
            tuple(axis for axis in axes if axis not in written),
        )
        for axes in tied.values()
    ]
    return [channels for channels in found if channels.writers]


class _LabelReader(Reader[Labels]):
    """Labels of the axes of a program's values: which ones are tied, and which ones are fixed.

    A union-find structure: `_parent` leads from a label to the one that it is tied to.
    """

    def __init__(self) -> None:
        self._parent: list[Label] = []
        self._fixed: list[bool] = []

    def fresh(self, shape: Sequence[int]) -> Labels:
        """Returns new labels for the axes of a value, tied to nothing."""
        first = len(self._parent)
        self._parent += range(first, first + len(shape))
        self._fixed += [False] * len(shape)
        return tuple(range(first, first + len(shape)))

    def root(self, label: Label) -> Label:
        """Returns the label that represents all labels tied to this one."""
        while self._parent[label] != label:
            label = self._parent[label]
        return label

    def tie(self, a: Label, b: Label) -> None:
        """Makes both the same label."""
        a, b = self.root(a), self.root(b)
        self._parent[max(a, b)] = min(a, b)
        self._fixed[min(a, b)] = self._fixed[a] or self._fixed[b]

    def fix(self, *values: Sequence[Label]) -> None:
        """Marks that the order along these axes matters."""
        for label in (label for labels in values for label in labels):
            self._fixed[self.root(label)] = True

    def is_fixed(self, label: Label) -> bool:
        """Returns whether the order along this axis matters."""
        return self._fixed[self.root(label)]

    def constant(self, operand: Any) -> Labels:
        """Constants and closed-over arrays cannot be reordered with the rest."""
        labels = self.fresh(shape_of(operand))
        self.fix(labels)
        return labels

    def join(self, a: Labels, b: Labels) -> Labels:
        """Both branches, and all passes of a loop, have their channels in one order."""
        for left, right in zip(a, b, strict=True):
            self.tie(left, right)
        return a

    def chosen(self, value: Labels, by: Labels, shape: Sequence[int]) -> Labels:
        """Which branch runs does not change the order."""
        del by, shape
        return value

    def entry(self, value: Labels, shape: Sequence[int]) -> Labels:
        """A scan uses the order of its layers."""
        del shape
        self.fix(value[:1])
        return value[1:]

    def stacked(self, value: Labels, shape: Sequence[int], length: int) -> Labels:
        """A scan decides the order of its results."""
        del shape
        layers = self.fresh((length,))
        self.fix(layers)
        return (*layers, *value)

    def resized(self, value: Labels, before: Sequence[int], after: Sequence[int]) -> Labels:
        """Channels of different devices are not reordered."""
        del before, after
        self.fix(value)
        return value

    def apply(
        self, equation: core.JaxprEqn, operands: Sequence[Labels], times: Times
    ) -> list[Labels]:
        """Ties the axes of operands and results, or fixes all of them."""
        del times
        name = equation.primitive.name
        rule = _same_axes if name in ELEMENTWISE - _ORDERED else _RULES.get(name)
        outputs = [self.fresh(shape_of(v)) for v in equation.outvars]
        if rule is None or not rule(self, equation, operands, outputs[0]):
            self.fix(*operands, *outputs)
        return outputs


# A rule ties the labels of operands and output, and fixes axes whose order the operation uses. It
# returns False if it does not cover the case.
# (trace, equation, operands, result) -> whether the rule applies.
Rule = Callable[[_LabelReader, Any, Sequence[Labels], Labels], bool]


def _same_axes(
    trace: _LabelReader, equation: core.JaxprEqn, operands: Sequence[Labels], out: Labels
) -> bool:
    del equation
    for labels in operands:
        for a, b in zip(labels, out, strict=True) if labels else ():
            trace.tie(a, b)
    return True


def _broadcast(
    trace: _LabelReader, equation: core.JaxprEqn, operands: Sequence[Labels], out: Labels
) -> bool:
    shape, result = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    # An axis of size 1 that grows has the same value everywhere, so its order is free.
    for axis, place in enumerate(equation.params["broadcast_dimensions"]):
        if shape[axis] == result[place]:
            trace.tie(operands[0][axis], out[place])
    return True


def _transpose(
    trace: _LabelReader, equation: core.JaxprEqn, operands: Sequence[Labels], out: Labels
) -> bool:
    for axis, label in zip(equation.params["permutation"], out, strict=True):
        trace.tie(operands[0][axis], label)
    return True


def _reshape(
    trace: _LabelReader, equation: core.JaxprEqn, operands: Sequence[Labels], out: Labels
) -> bool:
    """Axes that the reshape keeps whole keep their label. Merged and split axes are fixed."""
    shape, result = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    # An axis is the same before and after if it has the same size and the same stride.
    before = {(size, math.prod(shape[i + 1 :])): i for i, size in enumerate(shape) if size > 1}
    after = {(size, math.prod(result[i + 1 :])): i for i, size in enumerate(result) if size > 1}
    for key, axis in before.items():
        if key in after:
            trace.tie(operands[0][axis], out[after[key]])
        else:
            trace.fix([operands[0][axis]])
    trace.fix([out[axis] for key, axis in after.items() if key not in before])
    return True


def _reduce(
    trace: _LabelReader, equation: core.JaxprEqn, operands: Sequence[Labels], out: Labels
) -> bool:
    left = [a for a in range(len(operands[0])) if a not in equation.params["axes"]]
    for axis, label in zip(left, out, strict=True):
        trace.tie(operands[0][axis], label)
    return True


def _window(
    trace: _LabelReader, equation: core.JaxprEqn, operands: Sequence[Labels], out: Labels
) -> bool:
    shape, result = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    for axis, window in enumerate(equation.params["window_dimensions"]):
        if window == 1 and shape[axis] == result[axis]:
            trace.tie(operands[0][axis], out[axis])
        else:
            trace.fix([operands[0][axis], out[axis]])
    return True


def _dot(
    trace: _LabelReader, equation: core.JaxprEqn, operands: Sequence[Labels], out: Labels
) -> bool:
    contracted, batched = equation.params["dimension_numbers"]
    for left, right in (*zip(*contracted, strict=True), *zip(*batched, strict=True)):
        trace.tie(operands[0][left], operands[1][right])
    free = [
        [labels[a] for a in range(len(labels)) if a not in contracted[side] + batched[side]]
        for side, labels in enumerate(operands)
    ]
    ordered = [*(operands[0][a] for a in batched[0]), *free[0], *free[1]]
    for a, b in zip(ordered, out, strict=True):
        trace.tie(a, b)
    return True


def _conv(
    trace: _LabelReader, equation: core.JaxprEqn, operands: Sequence[Labels], out: Labels
) -> bool:
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    image, kernel = operands
    lhs, rhs, result = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    sizes = [shape_of(equation.invars[0])[lhs[1]], shape_of(equation.invars[1])[rhs[0]]]
    # Other groups would tie channels to their group, and not only to each other.
    depthwise = groups > 1 and sizes == [groups, groups]
    if equation.params["batch_group_count"] != 1 or not (groups == 1 or depthwise):
        return False
    trace.tie(image[lhs[1]], kernel[rhs[0] if depthwise else rhs[1]])
    trace.tie(image[lhs[0]], out[result[0]])
    trace.tie(kernel[rhs[0]], out[result[1]])
    # A convolution uses the order along its spatial axes.
    for labels, spec in ((image, lhs), (kernel, rhs), (out, result)):
        trace.fix([labels[axis] for axis in spec[2:]])
    return True


def _keep(
    trace: _LabelReader, equation: core.JaxprEqn, operands: Sequence[Labels], out: Labels
) -> bool:
    """The groups of a mask have their order along the axes that they run along."""
    trace.fix([out[axis] for axis in equation.params["axes"]])
    return _same_axes(trace, equation, operands, out)


# Running sums and masks use the order of some axes; results of several operands are tied one by
# one.
_ORDERED = frozenset(
    ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "optimization_barrier", *MASKS)
)
_RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    **dict.fromkeys(REDUCTIONS - {"argmax", "argmin"}, _reduce),
    **dict.fromkeys(("reduce_window_max", "reduce_window_sum", "reduce_window_min"), _window),
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    **dict.fromkeys(MASKS, _keep),
}
