"""Sums over the inputs of a weight, for some or all of the matrices that it stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Total(NamedTuple):
    """Sums over the inputs of a weight.

    Attributes:
      sum: (*stack, groups, ...), sums over the rows.
      rows: (*stack, groups), how many rows there were.
    """

    sum: Float[Array, "*stack groups ..."]
    rows: Float[Array, "*stack groups"]


Totals = dict[str, Total]


def added(a: Total, b: Total) -> Total:
    """The total over the rows of both."""
    return Total(a.sum + b.sum, a.rows + b.rows)


def zeros(like: Any) -> Any:
    """A total, or a tree of totals, over no rows; of arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), like)


def in_whole_stack(
    total: Total,
    sizes: Mapping[int, int],
    places: Mapping[int, tuple[int, int]],
    present: Sequence[int],
) -> Total:
    """The total of some matrices as one of all, with zeros for the others.

    Args:
      total: of some matrices.
      sizes: axis of the weight -> its size, for the axes of the whole stack in order.
      places: axis of the weight -> the first matrix along it, and how many there are.
      present: the axes that the arrays of `total` have; along the others there is one matrix.
    """
    at = tuple(slice(places[axis][0], sum(places[axis])) for axis in sizes)
    missing = tuple(i for i, axis in enumerate(sizes) if axis not in present)

    def placed(part: jax.Array) -> jax.Array:
        whole = jnp.expand_dims(part, missing)
        if whole.shape[: len(sizes)] == (*sizes.values(),):
            return whole
        shape = (*sizes.values(), *part.shape[len(present) :])
        return jnp.zeros(shape, part.dtype).at[at].set(whole)

    return Total(placed(total.sum), placed(total.rows))
