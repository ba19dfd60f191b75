"""The contract of a method of sparse training: three pure functions.

A training loop calls `init` once, `refresh` between steps, and `apply` inside the loss. Every
method here works with one `refresh` per epoch. Methods whose masks follow from the weights have
an empty state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import chex


class Sparsifier(NamedTuple):
    """A method of sparse training: turns dense parameters into sparse ones for the forward pass.

    Attributes:
      init: `(params, key) -> state`, a pytree of arrays.
      refresh: `(state, params, step) -> state` with the same structure, shapes, and dtypes; works
        under `jax.jit`. `step` counts optimizer steps and may be traced.
      apply: `(params, state) -> params`: sparse parameters, with the method's gradient rule.
    """

    init: Callable[[chex.ArrayTree, chex.PRNGKey], chex.ArrayTree]
    refresh: Callable[[chex.ArrayTree, chex.ArrayTree, chex.Numeric], chex.ArrayTree]
    apply: Callable[[chex.ArrayTree, chex.ArrayTree], chex.ArrayTree]


def stateless(apply: Callable[[chex.ArrayTree], chex.ArrayTree]) -> Sparsifier:
    """A sparsifier with an empty state."""
    return Sparsifier(
        init=lambda params, key: (),
        refresh=lambda state, params, step: state,
        apply=lambda params, state: apply(params),
    )
