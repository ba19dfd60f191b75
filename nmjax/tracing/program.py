"""Reads off a program what it does with each of its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from nmjax.tracing.operations import (
    ELEMENTWISE,
    MOVES,
    gathered,
    number_of_picks,
    picked_axes,
)
from nmjax.tracing.products import Product, Side, read_product
from nmjax.tracing.uses import Uses, contraction
from nmjax.tracing.values import ACTIVATION, CONSTANT, ZERO, Value, combined, concatenated, joined
from nmjax.tracing.views import Shape, no_axis, whole
from nmjax.tracing.walk import Reader, Times, is_variable, shape_of
from nmjax.trees.leaves import named_leaves

if TYPE_CHECKING:
    from jax.extend import core


PRODUCT = "a product with another weight"
# Operations that make a larger array of zeros from a zero.
_FILLS = ("broadcast_in_dim", "convert_element_type", "copy", "reshape")


@dataclass(frozen=True)
class Program:
    """What a traced forward pass does with its weights.

    Attributes:
      uses: leaf name -> its uses, for every array of the parameters, in tree order.
      other_multiply_adds: of the products of activations, such as attention scores.
    """

    uses: dict[str, Uses]
    other_multiply_adds: int


def read_program(forward: Callable[..., Any], params: Any, *inputs: Any) -> Program:
    """Traces `forward(params, *inputs)` and reads off what it does with each leaf of `params`.

    It follows weights through jit, scan, while, cond, remat, custom derivatives, vmap and
    shard_map; through reshapes, transposes, slices, casts, masks, and scalings.

    Args:
      forward: the network's forward pass; it is traced, not run.
      params: its parameters: arrays or ShapeDtypeStructs. Leaves that are neither, such as the
        functions in an Equinox module, are passed to `forward` as they are.
      *inputs: its inputs, likewise, or shapes of float32 arrays. Arrays that `forward` closes over
        count as constants.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.zeros((8, 16)), "bias": jnp.zeros(16)}
    >>> forward = lambda params, x: x @ params["kernel"] + params["bias"]
    >>> program = read_program(forward, params, jnp.zeros((2, 8)))
    >>> program.uses["kernel"].axes()
    Axes(reduction=(-2,), output=(-1,), taps=())
    >>> program.uses["bias"].axes()
    'in no product: meets activations entry by entry'
    """
    return read_trace(trace(forward, params, *inputs))


class Trace(NamedTuple):
    """A traced program: its jaxpr, and the names of its first arguments, which are weights."""

    jaxpr: core.Jaxpr
    names: tuple[str, ...]


def trace(forward: Callable[..., Any], params: Any, *inputs: Any) -> Trace:
    """Traces a forward pass; arguments as in `read_program`."""
    leaves, treedef = jax.tree.flatten((params, tuple(map(_described, inputs))))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]

    def run(*arrays: Any) -> Any:
        traced = iter(arrays)
        both = [next(traced) if _is_array(leaf) else leaf for leaf in leaves]
        params, inputs = jax.tree.unflatten(treedef, both)
        # Results need not be arrays, and nobody reads them.
        results = jax.tree.leaves(forward(params, *inputs))
        return [result for result in results if isinstance(result, jax.Array)]

    names = tuple(name for name, leaf in named_leaves(params).items() if _is_array(leaf))
    return Trace(jax.make_jaxpr(run)(*arrays).jaxpr, names)


def read_trace(traced: Trace) -> Program:
    """Reads off a traced program what it does with each weight."""
    shapes = list(map(shape_of, traced.jaxpr.invars))
    weights = dict(zip(traced.names, shapes, strict=False))
    reader = _WeightReader(weights)
    values = [Value(frozenset({n}), (whole(n, shape),)) for n, shape in weights.items()]
    reader.walk(traced.jaxpr, [*values, *[ACTIVATION] * (len(shapes) - len(values))])
    return Program(reader.uses, reader.other_multiply_adds)


def _described(given: Any) -> Any:
    """An input; a shape stands for a float32 array."""
    # An empty tuple is an empty tree, such as the state of an optimizer without state.
    is_shape = type(given) is tuple and given and all(type(size) is int for size in given)
    return jax.ShapeDtypeStruct(given, np.float32) if is_shape else given


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


class _WeightReader(Reader[Value]):
    """Follows weights to their products."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        self.uses = {name: Uses(shape) for name, shape in shapes.items()}
        self.other_multiply_adds = 0

    def constant(self, operand: Any) -> Value:
        """Whether a constant is zero decides what happens to the zeros of a weight."""
        if not is_variable(operand) and np.ndim(operand.val) == 0 and operand.val == 0:
            return ZERO
        return CONSTANT

    def join(self, a: Value, b: Value) -> Value:
        """A variable that is one of two values."""
        return joined(a, b)

    def chosen(self, value: Value, by: Value) -> Value:
        """A branch that the input chooses depends on the input."""
        if not by.is_activation:
            return value
        return dataclasses.replace(value, weights=frozenset(), is_activation=True)

    def entry(self, value: Value) -> Value:
        """A scan takes one layer of a stack after the other."""
        return value.moved("scan", lambda view: view.without([0]))

    def stacked(self, value: Value, length: int) -> Value:
        """A scan stacks its results along an axis that no weight has."""
        return value.moved("scan", lambda view: view.at([no_axis(length), *view.axes]))

    def resized(self, value: Value, shape: Shape) -> Value:
        """A device holds a shard."""
        return value.moved("shard_map", lambda view: view.resized(shape))

    def apply(
        self, equation: core.JaxprEqn, operands: Sequence[Value], times: Times
    ) -> list[Value]:
        """Interprets one operation, and records how it uses weights."""
        name = equation.primitive.name
        product = read_product(equation)
        if product is not None:
            return [self._product(product, operands, times)]
        if not any(operand.is_weight or operand.is_activation for operand in operands):
            is_zero = name in _FILLS and operands[:1] == [ZERO]
            return [ZERO if is_zero else CONSTANT for _ in equation.outvars]
        if name in ELEMENTWISE:
            self._record_elementwise(operands, times)
            ranks = [len(shape_of(operand)) for operand in equation.invars]
            if len(equation.outvars) > 1:  # Each result comes from its own operand.
                return [combined(name, [operand], [0]) for operand in operands]
            return [combined(name, operands, ranks)]
        if name in MOVES and not any(operand.is_weight for operand in operands[1:]):
            moved = operands[0].moved(name, lambda view: MOVES[name](equation, view))
            return [moved for _ in equation.outvars]
        if name in ("gather", "dynamic_slice"):
            return [self._pick(equation, operands, times)]
        if name == "concatenate":
            self._record_elementwise(operands, times)
            return [concatenated(operands)]
        return self._not_followed(equation, operands, times)

    def _product(self, product: Product, operands: Sequence[Value], times: Times) -> Value:
        side = _weight_side(operands)
        multiply_adds = (times or 0) * product.multiply_adds
        if side is None:
            weights = operands[0].weights | operands[1].weights
            is_activation = any(operand.is_activation for operand in operands[:2])
            self._count(weights if not is_activation else frozenset(), multiply_adds)
            lost = frozenset({PRODUCT} if weights else ())
            return (
                ACTIVATION
                if is_activation
                else Value(weights, lost_in=lost | operands[0].lost_in | operands[1].lost_in)
            )
        weight, other = operands[side], operands[1 - side]
        leaves = weight.weights or frozenset(view.leaf for view in weight.views)
        self._count(leaves, multiply_adds)
        if times is not None:
            if other.is_weight:
                self._record_elementwise((other, ACTIVATION), times)
            self._record_product(product.sides[side], weight, other)
        return ACTIVATION

    def _record_product(self, side: Side, weight: Value, other: Value) -> None:
        viewed = {view.leaf for view in weight.views}
        for leaf in weight.weights - viewed:
            operations = weight.lost_in - {PRODUCT}
            if operations:
                self.uses[leaf].lost_in |= operations
            else:
                self.uses[leaf].derived_from |= weight.weights
        for view in weight.views:
            uses = self.uses[view.leaf]
            found = contraction(view, side.reduction, side.output, side.taps, side.groups)
            if other.is_one_hot:
                uses.lookups |= set(found.reduction)
            elif not side.is_followed:
                uses.lost_in.add("a convolution, as its image,")
            elif not view.keeps_zeros:
                uses.derived_from |= weight.weights
            elif not found.reduction:  # It scales another weight, or the outputs.
                uses.is_elementwise = True
            elif found not in uses.contractions:
                uses.contractions.append(found)

    def _count(self, leaves: frozenset[str], multiply_adds: int) -> None:
        if not leaves:
            self.other_multiply_adds += multiply_adds
            return
        largest = max(sorted(leaves), key=lambda leaf: math.prod(self.uses[leaf].shape))
        self.uses[largest].multiply_adds += multiply_adds

    def _record_elementwise(self, operands: Sequence[Value], times: Times) -> None:
        if times is not None and any(operand.is_activation for operand in operands):
            for leaf in (leaf for operand in operands for leaf in operand.weights):
                self.uses[leaf].is_elementwise = True

    def _pick(self, equation: core.JaxprEqn, operands: Sequence[Value], times: Times) -> Value:
        """A gather or a dynamic slice."""
        value, *numbers = operands
        moved = value.moved(equation.primitive.name, lambda view: gathered(equation, view))
        by_input = any(number.is_activation for number in numbers)
        if times is not None:
            for view in value.views:
                uses = self.uses[view.leaf]
                if by_input:
                    picked = {p.axis for axis in picked_axes(equation) for p in view.axes[axis]}
                    uses.lookups |= {a - len(uses.shape) for a in picked if a is not None}
                elif number_of_picks(equation) > 1:
                    uses.is_table = True
        if by_input or value.is_activation:
            return dataclasses.replace(
                moved, weights=frozenset(), is_activation=True, lost_in=frozenset()
            )
        extra = frozenset(leaf for number in numbers for leaf in number.weights)
        return dataclasses.replace(moved, weights=moved.weights | extra)

    def _not_followed(
        self, equation: core.JaxprEqn, operands: Sequence[Value], times: Times
    ) -> list[Value]:
        name = equation.primitive.name
        weights = frozenset(leaf for operand in operands for leaf in operand.weights)
        if any(operand.is_activation for operand in operands):
            if times is not None:
                for leaf in weights:
                    self.uses[leaf].lost_in.add(name)
            return [ACTIVATION for _ in equation.outvars]
        lost = frozenset({name}).union(*(operand.lost_in for operand in operands))
        return [Value(weights, lost_in=lost) for _ in equation.outvars]


def _weight_side(operands: Sequence[Value]) -> int | None:
    """Which operand of a product is the weight; None if there is none, or nothing to multiply."""
    left, right = operands[:2]
    for side, (value, other) in enumerate(((left, right), (right, left))):
        if value.is_weight and other.is_activation:
            return side
        # Learned queries, repeated for each entry of a batch, are an input of the network.
        if value.is_weight and other.is_weight and other.is_broadcast and not value.is_broadcast:
            return side
    if left.is_activation and right.is_activation:
        matrices = [
            side
            for side, value in enumerate((left, right))
            if any(len(view.weight_axes) > 1 for view in value.views)
        ]
        return matrices[0] if len(matrices) == 1 else None
    return None
