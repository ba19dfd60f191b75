"""A planned weight as a stack of matrices, with one row per input of its product."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from nmjax.patterns.pattern import LeafPlan
from nmjax.trees.spans import merge, split

if TYPE_CHECKING:
    from jaxtyping import Array, Shaped


class Matrices(NamedTuple):
    """How to see a weight as matrices (*stack, groups, in, out), and a matrix as the weight.

    The inputs are flattened in the order (taps, reduction axes), as in `Statistics`. The feature
    groups of a grouped convolution have outputs of their own.

    Attributes:
      leaf: the weight's part of a plan.
      shape: of the weight.
      groups: feature groups.
    """

    leaf: LeafPlan
    shape: tuple[int, ...]
    groups: int

    def of(self, w: Shaped[Array, "*shape"]) -> Shaped[Array, "*stack groups in out"]:
        """The matrices of the weight."""
        merged = merge(w, self._spans)
        *stack, inputs, outputs = merged.shape
        cut = merged.reshape(*stack, inputs, self.groups, outputs // self.groups)
        return jnp.moveaxis(cut, -2, -3)

    def back(self, matrices: Shaped[Array, "*stack groups in out"]) -> Shaped[Array, "*shape"]:
        """The weight of matrices; undoes `of`."""
        cut: jax.Array = jnp.moveaxis(matrices, -3, -2)
        merged = cut.reshape(*cut.shape[:-2], cut.shape[-2] * cut.shape[-1])
        return split(merged, self.shape, self._spans)

    @property
    def _spans(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.leaf.tap_axes + self.leaf.reduction_axes, self.leaf.output_axes
