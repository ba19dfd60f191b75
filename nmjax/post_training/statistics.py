"""Statistics of the activations that each planned weight meets, for pruning with data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, jax.Array]):
    """A mapping from leaf name to a statistic of the inputs x of the leaf's product.

    A pytree. Each leaf is a stack of matrices (in, out), and the statistic has one entry per
    matrix: (*stack, groups, in) for mean squares, (*stack, groups, in, in) for Gram matrices. The
    inputs are flattened in the order (taps, reduction axes). Groups are those of a grouped
    convolution, one for everything else.

    Attributes:
      means: mean of x^2, or of x x^T, over all rows, float32.
      rows: (*stack, groups) float32, how many inputs each mean is over.
    """

    means: dict[str, jax.Array]
    rows: dict[str, jax.Array]

    def __getitem__(self, name: str) -> jax.Array:
        return self.means[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.means)

    def __len__(self) -> int:
        return len(self.means)

    def is_gram(self, name: str) -> bool:
        """Whether the statistic of a leaf is a Gram matrix; it holds the mean squares too."""
        return self.means[name].ndim == self.rows[name].ndim + 2

    def mean_square(self, name: str) -> Float[Array, "*stack groups in"]:
        """The mean square of each input, from either kind of statistic."""
        mean = self.means[name]
        return jnp.diagonal(mean, axis1=-2, axis2=-1) if self.is_gram(name) else mean
