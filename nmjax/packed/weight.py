"""The interface of packed weights, which is the same for every pattern.

A packed weight is a pytree node of a few arrays and a static `LeafPlan`. `jax.jit`,
`jax.device_put`, `jax.lax.scan` over a stack, and everything else that flattens trees treat it
like a dict of arrays.

Sizes that `jax.shard_map` or `jax.lax.scan` may have cut are read off the arrays, not the plan.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.layouts.axes import Shape
from nmjax.packed.bits import check_dtype
from nmjax.packed.operators import MatrixOperators
from nmjax.patterns.pattern import LeafPlan, Pattern
from nmjax.trees.spans import Span, stack_axes

_HOW_TO_CAST = (
    "Cast packed weights with packed.astype(dtype), which changes the values alone; a tree with "
    'jax.tree.map(lambda x: x.astype(dtype), tree, is_leaf=lambda x: hasattr(x, "astype"))'
)


class Packed(MatrixOperators):
    """A weight stored as its kept values and where they were.

    Subclasses are frozen dataclasses, registered as pytree nodes whose only static field is
    `leaf_plan`. `class PackedNM(Packed, pattern=NM)` makes `PackedNM` the packed form of `NM`.

    Attributes:
      values: the kept weights. Their leading axes are those of `leading`.
      leaf_plan: pattern, axes and shape of the weight; static.
      excess: what `misfits` counts, for error messages: "groups keep more than".
    """

    values: jax.Array
    leaf_plan: LeafPlan
    excess: ClassVar[str]
    _kinds: ClassVar[dict[type[Pattern], type[Packed]]] = {}

    def __init_subclass__(cls, *, pattern: type[Pattern] | None, **settings: Any) -> None:
        """Makes the subclass the packed form of a kind of pattern; None: another layout of one."""
        super().__init_subclass__(**settings)
        if pattern is not None:
            Packed._kinds[pattern] = cls

    @classmethod
    def kind_for(cls, pattern: Pattern) -> type[Packed]:
        """The packed form of weights with a pattern.

        Raises:
          TypeError: the pattern has no packed form.
        """
        if type(pattern) not in cls._kinds:
            raise TypeError(f"weights with the pattern {pattern} have no packed form")
        return cls._kinds[type(pattern)]

    @classmethod
    def pattern_of(cls, leaf_plan: LeafPlan) -> Any:
        """The pattern of a plan for this kind of packed weight.

        Raises:
          TypeError: the plan is for another kind.
        """
        if cls._kinds.get(type(leaf_plan.pattern)) is not cls:
            raise TypeError(f"{cls.__name__} does not hold weights with {leaf_plan.pattern}")
        return leaf_plan.pattern

    @classmethod
    @abc.abstractmethod
    def pack(cls, w: jax.Array, mask: jax.Array, leaf_plan: LeafPlan) -> Self:
        """Packs the weights that a mask keeps. There is no gradient.

        Args:
          w: weights of `leaf_plan.shape`, or with more axes in front; a floating dtype of whole
            bytes that has a zero.
          mask: booleans of the same shape. Where it keeps fewer than the pattern, zeros fill
            the remaining places. Where it keeps more, the values become NaN, which shows the
            mistake even under `jax.jit`, where the values of the mask are unknown.
          leaf_plan: of the weight.
        """

    @abc.abstractmethod
    def unpack(self) -> jax.Array:
        """The weight, with zeros where nothing was kept. Its gradient reaches the values."""

    @classmethod
    @abc.abstractmethod
    def misfits(cls, kept: jax.Array, leaf_plan: LeafPlan) -> tuple[int, int]:
        """How many groups or blocks break the pattern, and how many there are.

        Args:
          kept: booleans of the weight's shape, not traced.
          leaf_plan: of the weight.
        """

    @classmethod
    def cover(cls, nonzero: jax.Array, mask: jax.Array, leaf_plan: LeafPlan) -> jax.Array:
        """The mask, replaced by `nonzero` where the mask misses some and the pattern holds all.

        A kind that does not replace anything packs pruned weights only if the plan's score ranks
        zeros last.

        Args:
          nonzero: booleans of the weight's shape.
          mask: booleans of the same shape.
          leaf_plan: of the weight.
        """
        del nonzero, leaf_plan
        return mask

    @classmethod
    def stored_plan(cls, leaf_plan: LeafPlan, shape: Shape) -> LeafPlan:
        """The plan that stored values fit, if an earlier version counted kept weights otherwise.

        Args:
          leaf_plan: what the file says.
          shape: of the stored values.
        """
        del shape
        return leaf_plan

    @abc.abstractmethod
    def check(self) -> None:
        """Raises ValueError unless the arrays, of NumPy, are what `pack` could have made."""

    def check_arrays(self) -> None:
        """Checks the dtypes and shapes of the arrays against the plan; tracers pass too.

        Every product, `unpack` and every size calls it. Arrays may be those of one layer of a
        stack, or the shard of one device where the pattern can be cut.

        Raises:
          TypeError: a dtype that `pack` does not make, as after casting all arrays of a tree.
          ValueError: a shape that the plan does not allow.
        """
        dtype = getattr(self.values, "dtype", None)
        # `nmjax.quantize` makes integers of one byte.
        if dtype != np.int8:
            check_dtype(dtype, f"the values of {self}")

    def check_whole(self) -> None:
        """Raises ValueError if the arrays are the shard of one device, which has no dense form."""
        plan = self.leaf_plan
        if (self.inputs, self.outputs) != (plan.inputs, plan.outputs):
            raise ValueError(
                f"these arrays are a shard of {self}, with {self.inputs} inputs and {self.outputs} "
                "outputs: unpack outside jax.shard_map"
            )

    def check_array(self, name: str, dtype: Any, shape: Shape) -> None:
        """Checks one of the arrays that say where the values are.

        Raises:
          TypeError, ValueError: as in `check_arrays`.
        """
        array = getattr(self, name)
        found = getattr(array, "dtype", type(array).__name__)
        if (found, np.shape(array)) == (dtype, shape):
            return
        text = f"the {name} of {self} are {found}{np.shape(array)}, expected {dtype}{shape}"
        if found != dtype:
            raise TypeError(f"{text}. {_HOW_TO_CAST}")
        raise ValueError(text)

    def check_values(self, sizes: Sequence[int]) -> None:
        """Raises ValueError unless the plan is possible and the values have a shape that fits it.

        Args:
          sizes: of the values' axes behind the leading ones.
        """
        plan = self.leaf_plan
        if plan.misfit is not None:
            raise ValueError(plan.misfit)
        # More axes in front are fine: the plan may be that of one layer of a stack.
        leading = [plan.shape[axis] for axis in stack_axes(len(plan.shape), self.spans)]
        expected = (*leading, *sizes)
        if self.values.shape[max(self.values.ndim - len(expected), 0) :] != expected:
            raise ValueError(
                f"values of shape {self.values.shape} cannot hold {self}; expected {expected}"
            )
        try:
            self.check_arrays()
        except TypeError as error:  # The dtypes of a file are part of what it says.
            raise ValueError(str(error)) from error

    @property
    def pattern(self) -> Any:
        """The weight's pattern."""
        return self.leaf_plan.pattern

    @property
    @abc.abstractmethod
    def least_nbytes(self) -> int:
        """Bytes that the values and an ideal code of their positions need."""

    @property
    @abc.abstractmethod
    def leading(self) -> Shape:
        """Sizes of the weight's axes that the pattern does not use: the arrays' leading axes."""

    def portable(self) -> Packed:
        """The same weight in the layout that `nmjax.pack` makes and files store."""
        return self

    @property
    def spans(self) -> tuple[Span, ...]:
        """The axes of the weight that the pattern uses, all but the leading ones."""
        return self.leaf_plan.reduction_axes, self.leaf_plan.output_axes

    @classmethod
    def array_names(cls, leaf_plan: LeafPlan) -> tuple[str, ...]:
        """The fields that hold arrays."""
        del leaf_plan
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return tuple(field.name for field in fields if field.name != "leaf_plan")

    def stored_arrays(self) -> dict[str, Any]:
        """The arrays by name, as files store them."""
        return {name: getattr(self, name) for name in self.array_names(self.leaf_plan)}

    @property
    def shape(self) -> Shape:
        """Shape of the weight, with the axes in front of the planned ones.

        `jax.lax.scan` and `jax.tree.map(lambda x: x[0], packed)` take leading axes away.
        """
        planned, leading = self.leaf_plan.shape, self.leading
        in_front = len(leading) - len(stack_axes(len(planned), self.spans))
        return (*leading[: max(in_front, 0)], *planned[max(-in_front, 0) :])

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        self.check_arrays()
        return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(self))

    @property
    def inputs(self) -> int:
        """Number of inputs, at one tap of a convolution, that the arrays hold."""
        return self.leaf_plan.inputs

    @property
    def outputs(self) -> int:
        """Number of outputs that the arrays hold: within `jax.shard_map`, those of the shard."""
        return self.leaf_plan.outputs

    @property
    def taps(self) -> Shape:
        """Sizes of the axes of a convolution's taps."""
        return tuple(self.leaf_plan.shape[axis] for axis in self.leaf_plan.tap_axes)

    @property
    def kernel_taps(self) -> Shape:
        """Sizes of a convolution kernel's spatial axes, even if its taps count as inputs."""
        return self.taps

    @property
    def stack(self) -> Shape:
        """Sizes of the axes in front of one weight."""
        return self.leading

    @property
    def density(self) -> float:
        """Fraction of the weights that is stored."""
        sizes = (*self.stack, *self.taps, self.inputs, self.outputs)
        return self.values.size / max(math.prod(sizes), 1)

    @property
    def output_shape(self) -> Shape:
        """Sizes of the output axes. If the arrays are a shard, the first axis is the cut one."""
        full = tuple(self.leaf_plan.shape[axis] for axis in self.leaf_plan.output_axes)
        return (self.outputs // math.prod(full[1:]), *full[1:])

    @property
    def reduction_shape(self) -> Shape:
        """Sizes of the reduction axes. If the arrays are a shard, the first axis is the cut one."""
        full = tuple(self.leaf_plan.shape[axis] for axis in self.leaf_plan.reduction_axes)
        return (self.inputs // math.prod(full[1:]), *full[1:])

    def first_layer(self) -> Self:
        """The first weight of a stack; the weight itself if it is not a stack."""
        layer = self
        for _ in self.stack:
            layer = jax.tree.map(lambda array: array[0], layer)
        return layer

    def as_matrices(self) -> Self:
        """The same arrays as the weight (*taps, inputs, outputs), for any layout."""
        taps = self.taps
        shape = (*taps, self.inputs, self.outputs)
        tap_axes = tuple(range(-2 - len(taps), -2)) if self.leaf_plan.tap_axes else ()
        return self.with_plan(LeafPlan(self.leaf_plan.pattern, (-2,), (-1,), shape, tap_axes))

    def dense_matrices(self) -> jax.Array:
        """The weight with its zeros, (*taps, inputs, outputs): what defines every product."""
        return self.as_matrices().unpack()

    def with_plan(self, leaf_plan: LeafPlan) -> Self:
        """The same arrays under another plan."""
        return dataclasses.replace(self, leaf_plan=leaf_plan)  # type: ignore[type-var]

    @property
    def rounds_inputs(self) -> bool:
        """Whether products round their inputs to int8."""
        return False

    def rounded_inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """Inputs (batch, ...) of a product as integers, and their steps; None if they stay."""
        del x
        return None

    @property
    def has_one_scale(self) -> bool:
        """Whether integers have one scale for each output, which can wait for the sums."""
        return False

    def stored(self, dtype: np.dtype) -> Packed:
        """What a kernel multiplies by: integers as numbers of a dtype, floats as they are."""
        del dtype
        return self

    def scaled(self, sums: jax.Array) -> jax.Array:
        """Sums of products with `stored` as those of the weight."""
        return sums

    def with_values(self, values: jax.Array) -> Self:
        """The same weight with other values in the same places, such as a cast."""
        return dataclasses.replace(self, values=values)  # type: ignore[type-var]

    def astype(self, dtype: Any) -> Self:
        """The same weight with its values cast; where they are does not change.

        Casting every array, as `jax.tree.map(lambda a: a.astype(dtype), packed)` does, would cast
        the positions too.

        Raises:
          TypeError: packed weights cannot have that dtype.
        """
        self.check_arrays()
        dtype = jnp.dtype(dtype)
        check_dtype(dtype, f"the values of {self}")
        return self.with_values(self.values.astype(dtype))

    def result_dtype(self, x: jax.Array) -> np.dtype:
        """Dtype of a product with `x`: what JAX promotes both to, or that of `x` for float8."""
        # JAX promotes float8 to nothing else. Here it is storage, like int8 with scales.
        return x.dtype if self.dtype.itemsize == 1 else jnp.promote_types(x.dtype, self.dtype)

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.leaf_plan.pattern} {self.leaf_plan.shape}"


def cuts(part: int, whole: int) -> bool:
    """Whether a mesh may cut an axis of size `whole` into parts of size `part`."""
    return part == whole or (0 < part < whole and whole % part == 0)


def is_packed(node: Any) -> TypeGuard[Packed]:
    """Whether a node of a tree is a packed weight."""
    return isinstance(node, Packed)
