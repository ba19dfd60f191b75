"""Reads off a program what it does with each of its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.tracing.operations import (
    ELEMENTWISE,
    MOVES,
    UPDATES,
    gathered,
    moves_whole_axes,
    number_of_picks,
    picked_axes,
    side_by_side,
)
from nmjax.tracing.products import Product, Side, read_product
from nmjax.tracing.uses import Uses, contraction
from nmjax.tracing.values import (
    ACTIVATION,
    CONSTANT,
    PRODUCT,
    Value,
    combined,
    concatenated,
    joined,
)
from nmjax.tracing.views import Piece, Shape, no_axis, whole
from nmjax.tracing.walk import Reader, Times, is_variable, shape_of
from nmjax.trees.leaves import named_leaves

if TYPE_CHECKING:
    from jax.extend import core


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
    >>> program = read_program(forward, params, jnp.zeros(8))
    >>> program.uses["kernel"].axes()
    Axes(reduction=(-2,), output=(-1,), taps=())
    >>> program.uses["bias"].axes()
    'in no product: meets activations entry by entry'
    """
    return read_trace(trace(forward, params, *inputs))


class Trace(NamedTuple):
    """A traced program: its jaxpr, the names of its first arguments, and closed-over constants.

    The first arguments are weights.
    """

    jaxpr: core.Jaxpr
    names: tuple[str, ...]
    constants: tuple[Any, ...] = ()


def trace(forward: Callable[..., Any], params: Any, *inputs: Any) -> Trace:
    """Traces a forward pass; arguments as in `read_program`."""
    if not callable(forward):
        raise TypeError(
            "the forward pass must be a function forward(params, *inputs), got "
            f"{type(forward).__name__}"
        )
    named = named_leaves(params)
    if not any(map(is_array, named.values())):
        raise TypeError(f"the parameters must be a tree of arrays, got {type(params).__name__}")
    leaves, treedef = jax.tree.flatten((params, tuple(map(described, inputs))))
    arrays = [leaf for leaf in leaves if is_array(leaf)]

    def run(*arrays: Any) -> Any:
        traced = iter(arrays)
        both = [next(traced) if is_array(leaf) else leaf for leaf in leaves]
        params, inputs = jax.tree.unflatten(treedef, both)
        # Results need not be arrays, and nobody reads them.
        results = jax.tree.leaves(forward(params, *inputs))
        return [result for result in results if isinstance(result, jax.Array)]

    with explaining_shape_errors(inputs):
        closed = jax.make_jaxpr(run)(*arrays)
    names = tuple(name for name, leaf in named.items() if is_array(leaf))
    return Trace(closed.jaxpr, names, tuple(closed.consts))


def read_trace(traced: Trace) -> Program:
    """Reads off a traced program what it does with each weight."""
    shapes = list(map(shape_of, traced.jaxpr.invars))
    weights = dict(zip(traced.names, shapes, strict=False))
    reader = WeightReader(weights)
    reader.walk(traced.jaxpr, arguments_of(traced))
    return Program(reader.uses, reader.other_multiply_adds)


def arguments_of(traced: Trace) -> list[Value]:
    """What is known of the arguments of a traced program."""
    shapes = list(map(shape_of, traced.jaxpr.invars))
    values = [
        Value(frozenset({n}), (whole(n, shape),))
        for n, shape in zip(traced.names, shapes, strict=False)
    ]
    return [*values, *[ACTIVATION] * (len(shapes) - len(values))]


def described(given: Any) -> Any:
    """An input of a network; a shape stands for a float32 array."""
    # An empty tuple is an empty tree, such as the state of an optimizer without state.
    is_shape = type(given) is tuple and given and all(type(size) is int for size in given)
    return jax.ShapeDtypeStruct(given, np.float32) if is_shape else given


@contextlib.contextmanager
def explaining_shape_errors(inputs: Sequence[Any]) -> Iterator[None]:
    """Adds to an error that the program may have wanted integers in place of float32 inputs."""
    try:
        yield
    except Exception as error:
        given = jax.tree.leaves(tuple(map(described, inputs)))
        if any(isinstance(x, jax.ShapeDtypeStruct) and x.dtype == np.float32 for x in given):
            error.add_note(
                "Inputs given as shapes are traced as float32 arrays. If the network takes "
                "integers, such as token ids, pass jax.ShapeDtypeStruct(shape, jnp.int32) or an "
                "array."
            )
        raise


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def constant(leaf: Any) -> Any:
    """What stands in a program for a variable that does not depend on the input.

    Shapes do not show values, so arrays become ones. What is not an array stays as it is.
    """
    if not is_array(leaf):
        return leaf
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return (jnp.zeros if is_key else jnp.ones)(leaf.shape, leaf.dtype)


class WeightReader(Reader[Value]):
    """Follows weights to their products."""

    def __init__(self, shapes: dict[str, Shape]) -> None:
        self.uses = {name: Uses(shape) for name, shape in shapes.items()}
        self.other_multiply_adds = 0

    def constant(self, operand: Any) -> Value:
        """The number of a literal decides what happens to the zeros of a weight."""
        if is_variable(operand) or np.ndim(operand.val) or np.iscomplexobj(operand.val):
            return CONSTANT
        return Value(number=float(operand.val))

    def join(self, a: Value, b: Value) -> Value:
        """A variable that is one of two values."""
        return joined(a, b)

    def chosen(self, value: Value, by: Value, shape: Shape) -> Value:
        """A branch that the input chooses depends on the input."""
        return value.given_by_input(shape) if by.depends_on_input else value

    def entry(self, value: Value, shape: Shape) -> Value:
        """A scan takes one layer of a stack after the other."""
        return value.moved("scan", lambda view: view.without([0]), shape)

    def stacked(self, value: Value, shape: Shape, length: int) -> Value:
        """A scan stacks its results along an axis that no weight has."""
        # Each entry is computed anew, so an activation varies along the new axis.
        layers = Piece(-1, 1, length) if value.is_activation else no_axis(length)[0]
        return value.moved("scan", lambda view: view.at([(layers,), *view.axes]), shape)

    def resized(self, value: Value, before: Shape, after: Shape) -> Value:
        """A device holds a shard."""
        return value.moved("shard_map", lambda view: view.resized(after), before)

    def apply(
        self, equation: core.JaxprEqn, operands: Sequence[Value], times: Times
    ) -> list[Value]:
        """Interprets one operation, and records how it uses weights."""
        name = equation.primitive.name
        shapes = [shape_of(operand) for operand in equation.invars]
        product = read_product(equation)
        if product is not None:
            return [self._product(product, operands, shapes, times)]
        # Noise is no input of the network, though its key may be passed like one.
        if name.startswith("random_") or name == "threefry2x32":
            return [CONSTANT for _ in equation.outvars]
        if name == "iota":
            return [Value(is_iota=True)]
        if name in ELEMENTWISE:
            self._record_elementwise(operands, times)
            if len(equation.outvars) > 1:  # Each result comes from its own operand.
                return list(operands)
            return [combined(name, operands, shapes)]
        if name in MOVES and not any(operand.weights for operand in operands[1:]):
            moved = operands[0].moved(name, lambda view: MOVES[name](equation, view), shapes[0])
            if not moves_whole_axes(equation):
                moved = dataclasses.replace(moved, is_one_hot=False)
            return [moved for _ in equation.outvars]
        if name in ("gather", "dynamic_slice"):
            return [self._pick(equation, operands, shapes[0], times)]
        if name in ("concatenate", "stack"):
            self._record_elementwise(operands, times)
            views = [
                [side_by_side(equation, part, view) for view in value.views]
                for part, value in enumerate(operands)
            ]
            return [concatenated(operands, views)]
        return self._not_followed(equation, operands, shapes, times)

    def _product(
        self, product: Product, operands: Sequence[Value], shapes: Sequence[Shape], times: Times
    ) -> Value:
        pair = operands[:2]
        sides = weight_sides(product, pair)
        multiply_adds = (times or 0) * product.multiply_adds
        charged = [pair[side] for side in sides] or pair
        self._count(frozenset(n for value in charged for n in value.weights), multiply_adds)
        if len(sides) == 1:
            if times is not None:
                self._record_product(product.sides[sides[0]], pair[sides[0]], pair[1 - sides[0]])
            self._record_elementwise((pair[1 - sides[0]], ACTIVATION), times)
            return ACTIVATION
        weights = frozenset(name for value in pair for name in value.weights)
        if not weights:
            return ACTIVATION if any(v.depends_on_input for v in pair) else CONSTANT
        lost = frozenset({PRODUCT}).union(*(value.lost_in for value in pair))
        if len(sides) == 2 and times is not None:
            for leaf in weights:
                self.uses[leaf].derived_from |= weights
        elif times is not None:
            is_convolution = not product.sides[0].is_followed
            if is_convolution and pair[1].weights:
                # Which operand is the kernel is certain, whatever the image is.
                self._record_product(product.sides[1], pair[1], pair[0])
            for value, shape in zip(pair, shapes, strict=False):
                if value.is_matrix(shape):
                    for leaf in value.weights:
                        self.uses[leaf].is_multiplied_apart = True
        depends = any(value.depends_on_input for value in pair)
        return ACTIVATION if len(sides) == 2 else Value(weights, (), depends, lost_in=lost)

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
            if not found.reduction:  # It scales another weight, or the outputs.
                uses.is_elementwise = True
            elif other.is_one_hot and not side.taps:
                uses.lookups |= set(found.reduction)
            elif not side.is_followed:
                uses.lost_in.add("a convolution, as its image,")
            elif not view.keeps_zeros:
                uses.derived_from |= weight.weights
            elif found not in uses.contractions:
                uses.contractions.append(found)

    def _count(self, leaves: frozenset[str], multiply_adds: int) -> None:
        if not leaves:
            self.other_multiply_adds += multiply_adds
            return
        largest = max(sorted(leaves), key=lambda leaf: math.prod(self.uses[leaf].shape))
        self.uses[largest].multiply_adds += multiply_adds

    def _record_elementwise(self, operands: Sequence[Value], times: Times) -> None:
        if times is not None and any(operand.depends_on_input for operand in operands):
            for leaf in (leaf for operand in operands for leaf in operand.weights):
                self.uses[leaf].is_elementwise = True

    def _pick(
        self, equation: core.JaxprEqn, operands: Sequence[Value], shape: Shape, times: Times
    ) -> Value:
        """A gather or a dynamic slice."""
        value, *numbers = operands
        moved = value.moved(equation.primitive.name, lambda view: gathered(equation, view), shape)
        by_input = any(number.depends_on_input for number in numbers)
        if times is not None:
            for view in value.views:
                uses = self.uses[view.leaf]
                if by_input:
                    picked = {p.axis for axis in picked_axes(equation) for p in view.axes[axis]}
                    uses.lookups |= {a - len(uses.shape) for a in picked if a is not None}
                elif number_of_picks(equation) > 1:
                    uses.is_table = True
        result = shape_of(equation.outvars[0])
        if not value.weights:
            return ACTIVATION if by_input or value.depends_on_input else CONSTANT
        if by_input:
            return moved.given_by_input(result)
        extra = frozenset(leaf for number in numbers for leaf in number.weights)
        return dataclasses.replace(moved, weights=moved.weights | extra)

    def _not_followed(
        self,
        equation: core.JaxprEqn,
        operands: Sequence[Value],
        shapes: Sequence[Shape],
        times: Times,
    ) -> list[Value]:
        name = equation.primitive.name
        weights = frozenset(leaf for operand in operands for leaf in operand.weights)
        depends = any(operand.depends_on_input for operand in operands)
        if not weights:
            return [ACTIVATION if depends else CONSTANT for _ in equation.outvars]
        lost = frozenset({name}).union(*(operand.lost_in for operand in operands))
        if not depends:
            return [Value(weights, lost_in=lost) for _ in equation.outvars]
        self._record_elementwise(operands, times)
        if name in UPDATES:  # Such as the slots of a cache, or a history of scales.
            return [ACTIVATION for _ in equation.outvars]
        # The operation may be a product of its own, such as a kernel.
        for operand, shape in zip(operands, shapes, strict=True):
            if times is not None and operand.is_matrix(shape):
                for leaf in operand.weights:
                    self.uses[leaf].lost_in.add(name)
        return [ACTIVATION for _ in equation.outvars]


def weight_sides(product: Product, pair: Sequence[Value]) -> list[int]:
    """Which operands of a product are weights that meet an input; both or none if unclear."""
    left, right = pair
    found = []
    for side, (value, other) in enumerate(((left, right), (right, left))):
        # Learned queries, repeated for each entry of a batch, are an input of the network.
        is_query = other.is_weight and any(
            all(p.axis is None for p in view.axes[axis])
            and any(p.size > 1 for p in view.axes[axis])
            for view in other.views
            for axis in product.sides[1 - side].output
        )
        if value.is_weight and (other.depends_on_input or is_query):
            found.append(side)
    if found:
        return found
    # The input has picked or scaled these weights.
    if left.depends_on_input and right.depends_on_input:
        return [side for side in (0, 1) if pair[side].weights]
    return []
