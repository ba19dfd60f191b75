"""The contract of a method of sparse training: four pure functions.

A training loop calls `init` once, `refresh` between steps, `apply` inside the loss, and `export`
after training. Every method here works with one `refresh` per epoch. Methods whose masks follow
from the weights have an empty state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from nmjax.packed.packing import check_pattern
from nmjax.plans import Plan
from nmjax.pruning import Masks, prune

if TYPE_CHECKING:
    import chex


class Sparsifier(NamedTuple):
    """A method of sparse training: turns dense parameters into sparse ones for the forward pass.

    Attributes:
      init: `(params, key) -> state`, a pytree of arrays.
      refresh: `(state, params, step) -> state` with the same structure, shapes, and dtypes; works
        under `jax.jit`. `step` counts optimizer steps and may be traced.
      apply: `(params, state) -> params`: sparse parameters, with the method's gradient rule.
      export: `(params, state) -> params`: the sparse parameters that were trained, for evaluation
        and `nmjax.pack`. Raises ValueError if they do not have the plan's pattern yet. It looks at
        values, so it runs outside `jax.jit`.

    >>> import jax
    >>> import nmjax
    >>> params = {"kernel": jax.numpy.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> sparsifier = nmjax.one_shot(plan)
    >>> state = sparsifier.init(params, jax.random.key(0))
    >>> trained = {"kernel": params["kernel"] - 2}  # The masks stay; [3] is now larger than [1].
    >>> packed = nmjax.pack(sparsifier.export(trained, state), plan)
    >>> nmjax.unpack(packed)["kernel"].ravel().tolist()
    [2.0, 1.0, 0.0, 0.0]
    """

    init: Callable[[chex.ArrayTree, chex.PRNGKey], chex.ArrayTree]
    refresh: Callable[[chex.ArrayTree, chex.ArrayTree, chex.Numeric], chex.ArrayTree]
    apply: Callable[[chex.ArrayTree, chex.ArrayTree], chex.ArrayTree]
    export: Callable[[chex.ArrayTree, chex.ArrayTree], chex.ArrayTree]


def stateless(
    apply: Callable[[chex.ArrayTree], chex.ArrayTree],
    export: Callable[[chex.ArrayTree], chex.ArrayTree],
) -> Sparsifier:
    """A sparsifier with an empty state."""
    return Sparsifier(
        init=lambda params, key: (),
        refresh=lambda state, params, step: state,
        apply=lambda params, state: apply(params),
        export=lambda params, state: export(params),
    )


def masks_of(state: Any, kind: type[tuple[Any, ...]]) -> Masks:
    """The masks of a method's state; raises TypeError if it is not one."""
    if not all(hasattr(state, field) for field in cast(Any, kind)._fields):
        raise TypeError(
            f"expected a state of type {kind.__name__}, as sparsifier.init(params, key) and "
            f"sparsifier.refresh(state, params, step) return it; got {type(state).__name__}"
        )
    return cast(Masks, state.masks)


def export_masked(
    params: chex.ArrayTree, plan: Plan, masks: Masks, unfinished: str
) -> chex.ArrayTree:
    """The parameters pruned with the masks of a state, if they have the plan's pattern.

    Args:
      params: dense parameters that fit the plan.
      plan: of the method.
      masks: leaf name -> boolean array.
      unfinished: why the masks may still keep too much, for the error.

    Raises:
      ValueError: the pruned parameters are not as sparse as the plan says (the error lists all
        such leaves).
    """
    pruned = prune(params, plan, masks)
    check_pattern(pruned, plan, f"{unfinished} These weights are not sparse yet")
    return pruned
