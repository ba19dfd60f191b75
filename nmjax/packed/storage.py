"""Bytes that packed parameters take, and the minimum that they could take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from nmjax.packed.packing import is_packed
from nmjax.tables import Row, html_table, text_table
from nmjax.trees.leaves import is_array, named_leaves

_HEADER = ("leaf", "pattern", "dense bytes", "packed", "lower bound", "packed / dense")
_NUMBERS = (2, 3, 4, 5)


@dataclass(frozen=True)
class LeafSize:
    """Bytes of one leaf.

    Attributes:
      pattern: its pattern as text, or "dense".
      dense: bytes with all weights stored.
      packed: bytes as stored.
      least: bytes of the kept values and of an ideal code for their positions.
    """

    pattern: str
    dense: int
    packed: int
    least: int

    @property
    def ratio(self) -> float:
        """Packed bytes over dense ones."""
        return self.packed / max(self.dense, 1)


@dataclass(frozen=True)
class Sizes:
    """Sizes of packed parameters in bytes; `print(sizes)` shows a table.

    Attributes:
      leaves: leaf name -> its size, in tree order.
    """

    leaves: dict[str, LeafSize]

    @property
    def total(self) -> LeafSize:
        """The sum over the leaves."""
        leaves = self.leaves.values()
        return LeafSize(
            "",
            sum(leaf.dense for leaf in leaves),
            sum(leaf.packed for leaf in leaves),
            sum(leaf.least for leaf in leaves),
        )

    def __str__(self) -> str:
        return text_table(_HEADER, self._rows(), right=_NUMBERS)

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows(), right=_NUMBERS)

    def _rows(self) -> list[Row]:
        named = {**self.leaves, "total": self.total}
        return [
            (name, x.pattern, f"{x.dense:,}", f"{x.packed:,}", f"{x.least:,}", f"{x.ratio:.4f}")
            for name, x in named.items()
        ]


def sizes(packed: Any) -> Sizes:
    """Measures each leaf in bytes: dense, packed, and the least that any code of positions needs.

    For N:M that is log2(C(M, N)) bits per group, for blocks log2 of the ways to choose them.
    Random keys and leaves that are not arrays are left out.

    Args:
      packed: a tree with packed leaves, of arrays or ShapeDtypeStructs.

    Raises:
      TypeError: `packed` is not a tree, such as a text or a number.

    >>> import jax.numpy as jnp
    >>> import nmjax
    >>> params = {"kernel": jnp.ones((64, 64), jnp.bfloat16)}
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> sizes(nmjax.pack(nmjax.prune(params, plan), plan)).total
    LeafSize(pattern='', dense=8192, packed=4608, least=4427)
    """
    leaves = named_leaves(packed, is_leaf=is_packed)
    if leaves.keys() == {""} and not (is_packed(packed) or hasattr(packed, "shape")):
        raise TypeError(f"expected a tree of arrays or packed weights, got {type(packed).__name__}")
    return Sizes(
        {
            name: _leaf_size(name, leaf)
            for name, leaf in leaves.items()
            if is_packed(leaf) or is_array(leaf)
        }
    )


def _leaf_size(name: str, leaf: Any) -> LeafSize:
    try:
        # Shapes and dtypes suffice, so that ShapeDtypeStructs have sizes too.
        dense = math.prod(np.shape(leaf)) * np.dtype(leaf.dtype).itemsize
        if is_packed(leaf):
            return LeafSize(str(leaf.leaf_plan.pattern), dense, leaf.nbytes, leaf.least_nbytes)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} has no size in bytes: {error}") from error
    return LeafSize("dense", dense, dense, dense)
