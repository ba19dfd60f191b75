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

import jax

from nmjax.layouts import layout
from nmjax.tracing.channel_order import Channels, LeafAxis
from nmjax.tracing.variables import is_variable
from nmjax.trees.leaves import named_leaves

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
      One entry for each set of channels, in tree order. Its writers are the leaves whose output
      axis it is, by the names and shapes that `nmjax.make_plan` uses. Sets without a writer are
      left out.

    >>> import jax.numpy as jnp
    >>> variables = {"first": jnp.ones((3, 8)), "second": jnp.ones((8, 2))}
    >>> forward = lambda variables, x: jnp.tanh(x @ variables["first"]) @ variables["second"]
    >>> find_channels(forward, variables, jnp.ones((1, 3)))
    [Channels(writers=(('first', -1),), followers=(('second', -2),))]
    """
    closed = jax.make_jaxpr(forward)(variables, *inputs)
    trace = _Trace()
    arguments = [trace.fresh(_shape(v)) for v in closed.jaxpr.invars]
    leaves = dict(zip(named_leaves(variables), map(_shape, closed.jaxpr.invars), strict=False))
    # The caller decides the order along the axes of inputs and outputs.
    trace.fix(*arguments[len(leaves) :])
    trace.fix(*trace.run(closed.jaxpr, arguments))
    tied: dict[Label, list[LeafAxis]] = {}
    for (name, shape), labels in zip(leaves.items(), arguments, strict=False):
        for i, label in enumerate(labels):
            if not trace.is_fixed(label) and shape[i] > 1:  # A single channel has one order.
                tied.setdefault(trace.root(label), []).append((name, i - len(shape)))
    written = {(name, axis) for name in leaves for axis in _output_axes(name, leaves)}
    found = [
        Channels(
            tuple(axis for axis in axes if axis in written),
            tuple(axis for axis in axes if axis not in written),
        )
        for axes in tied.values()
    ]
    return [channels for channels in found if channels.writers]


def _output_axes(name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    axes = layout(name, shapes)
    return () if isinstance(axes, str) else axes.output


class _Trace:
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

    def run(self, jaxpr: core.Jaxpr, arguments: Sequence[Labels]) -> list[Labels]:
        """Labels the values of a program, and returns the labels of its outputs."""
        known = dict(zip(jaxpr.invars, arguments, strict=True))

        def labels_of(v: Any) -> Labels:
            if is_variable(v) and v in known:
                return known[v]
            # Constants and closed-over arrays cannot be reordered with the rest.
            constant = self.fresh(_shape(v))
            self.fix(constant)
            return constant

        for equation in jaxpr.eqns:
            operands = [labels_of(v) for v in equation.invars]
            known.update(zip(equation.outvars, self._apply(equation, operands), strict=True))
        return [labels_of(v) for v in jaxpr.outvars]

    def _apply(self, equation: core.JaxprEqn, operands: list[Labels]) -> list[Labels]:
        name = equation.primitive.name
        body = next((equation.params[key] for key in _BODIES if key in equation.params), None)
        if name in _CALLS and body is not None:
            return self.run(getattr(body, "jaxpr", body), operands)
        rule = _same_axes if name in _ELEMENTWISE else _RULES.get(name)
        outputs = [self.fresh(_shape(v)) for v in equation.outvars]
        if rule is None or not rule(self, equation, operands, outputs[0]):
            self.fix(*operands, *outputs)
        return outputs


# A rule ties the labels of operands and output, and fixes axes whose order the operation uses. It
# returns False if it does not cover the case.
# (trace, equation, operands, result) -> whether the rule applies.
Rule = Callable[[_Trace, Any, list[Labels], Labels], bool]


def _same_axes(trace: _Trace, equation: core.JaxprEqn, operands: list[Labels], out: Labels) -> bool:
    del equation
    for labels in operands:
        for a, b in zip(labels, out, strict=True) if labels else ():
            trace.tie(a, b)
    return True


def _broadcast(trace: _Trace, equation: core.JaxprEqn, operands: list[Labels], out: Labels) -> bool:
    shape, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
    # An axis of size 1 that grows has the same value everywhere, so its order is free.
    for axis, place in enumerate(equation.params["broadcast_dimensions"]):
        if shape[axis] == result[place]:
            trace.tie(operands[0][axis], out[place])
    return True


def _transpose(trace: _Trace, equation: core.JaxprEqn, operands: list[Labels], out: Labels) -> bool:
    for axis, label in zip(equation.params["permutation"], out, strict=True):
        trace.tie(operands[0][axis], label)
    return True


def _reshape(trace: _Trace, equation: core.JaxprEqn, operands: list[Labels], out: Labels) -> bool:
    """Axes that the reshape keeps whole keep their label. Merged and split axes are fixed."""
    shape, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
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


def _reduce(trace: _Trace, equation: core.JaxprEqn, operands: list[Labels], out: Labels) -> bool:
    left = [a for a in range(len(operands[0])) if a not in equation.params["axes"]]
    for axis, label in zip(left, out, strict=True):
        trace.tie(operands[0][axis], label)
    return True


def _window(trace: _Trace, equation: core.JaxprEqn, operands: list[Labels], out: Labels) -> bool:
    shape, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
    for axis, window in enumerate(equation.params["window_dimensions"]):
        if window == 1 and shape[axis] == result[axis]:
            trace.tie(operands[0][axis], out[axis])
        else:
            trace.fix([operands[0][axis], out[axis]])
    return True


def _dot(trace: _Trace, equation: core.JaxprEqn, operands: list[Labels], out: Labels) -> bool:
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


def _conv(trace: _Trace, equation: core.JaxprEqn, operands: list[Labels], out: Labels) -> bool:
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    image, kernel = operands
    lhs, rhs, result = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    sizes = [_shape(equation.invars[0])[lhs[1]], _shape(equation.invars[1])[rhs[0]]]
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


_ELEMENTWISE_NAMES = """
    abs add add_any and ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1 floor
    ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow
    reduce_precision rem round rsqrt select_n sign sin sqrt square stop_gradient sub tanh xor
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())
_RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or"), _reduce),
    **dict.fromkeys(("reduce_window_max", "reduce_window_sum", "reduce_window_min"), _window),
    "dot_general": _dot,
    "conv_general_dilated": _conv,
}
_CALL_NAMES = """
    pjit jit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call
    custom_vjp_call_jaxpr
"""
_CALLS = frozenset(_CALL_NAMES.split())
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
