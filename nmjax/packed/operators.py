"""Packed matrices as operands of `@`, and the errors for what else people try with them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, Self

import jax
import jax.numpy as jnp

_WAYS_OUT = (
    "multiply it with x @ packed or nmjax.packed_matmul(x, packed), or make it dense with "
    "nmjax.unpack(packed)"
)


class PackedType(abc.ABCMeta):
    """Makes JAX say how to use a packed weight.

    `jnp.einsum` and most other functions refuse what is not an array by printing its type, and
    leave no other place to explain it. `__jax_array__` would be one, but then `x @ packed` could
    not reach `__rmatmul__`.
    """

    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__qualname__}', a packed weight: {_WAYS_OUT}>"


class MatrixOperators(metaclass=PackedType):
    """`x @ packed`, `packed @ x` and transposes, for classes with a `leaf_plan`."""

    # NumPy arrays leave `x @ packed` to this class.
    __array_ufunc__ = None
    # `nmjax.packed_matmul`, which sets itself: it lies on a floor above this one.
    product: ClassVar[Callable[[Any, Any], jax.Array]]

    leaf_plan: Any
    shape: Any
    with_plan: Callable[[Any], Any]

    @property
    def mT(self) -> Self:  # noqa: N802
        """The weight with its last two axes swapped; the same arrays under another plan.

        Raises:
          ValueError: these axes are not those of one matrix of inputs and outputs.
        """
        plan = self.leaf_plan
        if sorted((*plan.reduction_axes, *plan.output_axes)) != [-2, -1]:
            raise ValueError(
                f"{self} has inputs along {plan.reduction_axes} and outputs along "
                f"{plan.output_axes}: only matrices are transposed packed. Use nmjax.unpack first"
            )
        *stack, rows, columns = plan.shape
        swapped = dataclasses.replace(
            plan,
            reduction_axes=plan.output_axes,
            output_axes=plan.reduction_axes,
            shape=(*stack, columns, rows),
        )
        return self.with_plan(swapped)

    @property
    def T(self) -> Self:  # noqa: N802
        """The transposed matrix; the same arrays under another plan.

        Raises:
          ValueError: it is not one matrix.
        """
        self._check_matrix()
        return self.mT

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(
            f"a packed weight cannot be indexed: {_WAYS_OUT}. NNX modules run on packed weights if "
            "they come from nmjax.nnx.pack or nmjax.nnx.load"
        )

    def __rmatmul__(self, x: Any) -> Any:
        """`x @ packed`: `nmjax.packed_matmul` for a matrix (inputs, outputs)."""
        if not is_array(x):
            return NotImplemented
        self._check_matrix()
        self._check_summed(-2, "x @ packed", "x @ packed.T")
        return type(self).product(x, self)

    def __matmul__(self, x: Any) -> Any:
        """`packed @ x`: `nmjax.packed_matmul` for a matrix (outputs, inputs)."""
        if isinstance(x, MatrixOperators):
            raise TypeError(f"cannot multiply two packed weights, {self} and {x}: unpack one")
        if not is_array(x):
            return NotImplemented
        self._check_matrix()
        self._check_summed(-1, "packed @ x", "packed.T @ x")
        x = jnp.asarray(x)
        if x.ndim < 2:
            return type(self).product(x, self)
        return type(self).product(x.mT, self).mT

    def __array__(self, *arguments: Any, **settings: Any) -> NoReturn:
        """Raises TypeError: NumPy would make an array of one object."""
        raise TypeError(f"{self} is not an array: {_WAYS_OUT}")

    def _check_matrix(self) -> None:
        if len(self.shape) != 2:
            raise ValueError(
                f"a weight of shape {self.shape} is not one matrix: use nmjax.packed_matmul for "
                "kernels of attention, nmjax.packed_conv for convolutions, and jax.vmap or "
                "jax.lax.scan for a stack of layers"
            )

    def _check_summed(self, axis: int, written: str, instead: str) -> None:
        """Raises ValueError unless the matrix keeps its inputs along an axis."""
        if self.leaf_plan.reduction_axes != (axis,):
            raise ValueError(
                f"{written} sums over axis {axis}, but {self} has its inputs along axis "
                f"{self.leaf_plan.reduction_axes[0]}: use {instead}, or nmjax.unpack to sum over "
                "the outputs"
            )


def is_array(x: Any) -> bool:
    """Whether something can be the other operand of a product."""
    return hasattr(x, "shape") and hasattr(x, "dtype")
