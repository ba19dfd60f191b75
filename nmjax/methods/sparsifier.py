"""The contract of a method of sparse training: four pure functions.

A training loop calls `init` once, `refresh` between steps, `apply` inside the loss, and `export`
after training. Methods whose masks follow from the weights have an empty state.

What a method may do beyond a boolean mask:

- **A factor in place of a mask.** `apply` may return any weights of the same shapes, and `export`
  returns what `apply` does once the method has reached the pattern.
- **A schedule.** The state holds the step of the last `refresh` (`Clock`), and `apply` computes
  everything else from it. Then `refresh` costs nothing and runs under `jax.jit` before every step;
  a loop that refreshes once per epoch gets a schedule that moves once per epoch.
- **An optimizer of its own, and what it learns.** Such a method is a `Method`: a sparsifier, a
  transformation of optax, and `follow`, which carries what the transformation learned over to the
  sparsifier. Scores that are learned beside the weights live in the state of the transformation,
  so the tree of parameters stays that of the model.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nmjax.masks.arguments import check_number, is_integer
from nmjax.packed.packing import check_pattern
from nmjax.plans import Plan
from nmjax.pruning import Masks, planned_leaves, prune
from nmjax.ste import check_has_values
from nmjax.trees.leaves import map_named

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


def _same(state: chex.ArrayTree, opt_state: chex.ArrayTree) -> chex.ArrayTree:
    del opt_state
    return state


class Method(NamedTuple):
    """A method with an optimizer part of its own.

    A training step calls, in this order, and all inside `jax.jit` if you like:

        state = sparsifier.refresh(state, params, step)
        grads = jax.grad(loss)(params)  # of sparsifier.apply(params, state)
        updates, opt_state = tx.update(grads, opt_state, params, masks=state.masks)
        params = optax.apply_updates(params, updates)
        state = method.follow(state, opt_state)

    Pass `masks=` if the state has masks.

    Attributes:
      sparsifier: makes the forward pass sparse.
      transformation: part of the optimizer's chain; the method says where it goes.
      follow: `(state, opt_state) -> state`, after each update: carries what the transformation
        learned over to the sparsifier's state. `opt_state` is that of the whole optimizer.
    """

    sparsifier: Sparsifier
    transformation: optax.GradientTransformationExtraArgs
    follow: Callable[[chex.ArrayTree, chex.ArrayTree], chex.ArrayTree] = _same


class Clock(NamedTuple):
    """State of the methods that follow a schedule.

    Attributes:
      step: int32 scalar, the optimizer step of the last `refresh`; 0 before the first.
    """

    step: jax.Array


def scheduled(
    apply: Callable[[chex.ArrayTree, jax.Array], chex.ArrayTree],
    plan: Plan,
    end: float | str,
) -> Sparsifier:
    """A sparsifier whose forward pass depends on the weights and the step.

    Args:
      apply: `(params, step) -> params`.
      plan: that the weights have from step `end` on.
      end: first step at which they have it, or a name for it.
    """

    def start(params: chex.ArrayTree, key: chex.PRNGKey) -> Clock:
        del key
        planned_leaves(params, plan)
        return Clock(jnp.zeros([], jnp.int32))

    def refresh(state: Clock, params: chex.ArrayTree, step: chex.Numeric) -> Clock:
        del params
        check_step(step)
        step_of(state)
        return Clock(jnp.asarray(step, jnp.int32))

    def export(params: chex.ArrayTree, state: Clock) -> chex.ArrayTree:
        sparse = apply(params, step_of(state))
        check_pattern(
            sparse,
            plan,
            f"training has not reached the pattern: it does in the first refresh at or after step "
            f"{end}, and the last was at step {_shown(state.step)}. These weights are not sparse "
            "yet",
        )
        return sparse

    return Sparsifier(start, refresh, lambda params, state: apply(params, step_of(state)), export)


def map_planned(
    function: Callable[[str, Any], Any], params: chex.ArrayTree, plan: Plan
) -> chex.ArrayTree:
    """Applies `(name, weight) -> weight` to the planned leaves, after checking that they fit."""
    planned_leaves(params, plan)
    return map_named(lambda name, leaf: function(name, leaf) if name in plan else leaf, params)


def step_of(state: Any) -> jax.Array:
    """The step in a state; raises TypeError if it has none."""
    if not hasattr(state, "step"):
        raise TypeError(
            "expected a state, as sparsifier.init(params, key) and sparsifier.refresh(state, "
            f"params, step) return it; got {type(state).__name__}"
        )
    return jnp.asarray(state.step)


def check_steps(**steps: int) -> None:
    """Raises TypeError or ValueError unless all are Python integers >= 0, in ascending order."""
    for name, step in steps.items():
        if isinstance(step, bool) or not is_integer(step):
            raise TypeError(
                f"{name} must be a Python integer, a number of optimizer steps; got {step!r} of "
                f"type {type(step).__name__}"
            )
    order = list(steps.values())
    if order[0] < 0 or any(a >= b for a, b in itertools.pairwise(order)):
        given = ", ".join(f"{name}={step}" for name, step in steps.items())
        raise ValueError(f"needs 0 <= {' < '.join(steps)} optimizer steps, got {given}")


def check_count(**counts: int) -> None:
    """Raises TypeError or ValueError unless all are Python integers >= 1."""
    for name, count in counts.items():
        check_steps(**{name: count})
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def check_rates(**rates: float) -> None:
    """Raises TypeError or ValueError unless all are numbers >= 0 and below 1, as of averages."""
    for name, rate in rates.items():
        check_number(name, rate)
        if not 0 <= rate < 1:
            raise ValueError(f"{name} is a rate of decay, 0 <= {name} < 1; got {rate}")


def is_due(step: jax.Array, last: chex.Numeric, every: int) -> jax.Array:
    """Whether a multiple of `every` steps lies between two refreshes, or at the later one."""
    # Not `step % every == 0`: a loop that refreshes once per epoch may skip every multiple.
    return step // every != jnp.asarray(last) // every


def _shown(step: Any) -> str:
    return "an unknown step" if isinstance(step, jax.core.Tracer) else str(step)


def stateless(
    apply: Callable[[chex.ArrayTree], chex.ArrayTree],
    export: Callable[[chex.ArrayTree], chex.ArrayTree],
) -> Sparsifier:
    """A sparsifier with an empty state."""

    def refresh(state: chex.ArrayTree, params: chex.ArrayTree, step: chex.Numeric) -> Any:
        del params
        check_step(step)
        return state

    return Sparsifier(
        init=lambda params, key: (),
        refresh=refresh,
        apply=lambda params, state: apply(params),
        export=lambda params, state: export(params),
    )


def check_step(step: Any) -> None:
    """Raises TypeError or ValueError unless `step` is a real number, or a scalar array of one."""
    is_array = hasattr(step, "shape") and hasattr(step, "dtype")
    if isinstance(step, bool) or not (is_array or isinstance(step, numbers.Real)):
        raise TypeError(
            "step counts optimizer steps, so it must be a number or a scalar array; got "
            f"{type(step).__name__}, in sparsifier.refresh(state, params, step)"
        )
    check_has_values(step, "step")
    if np.ndim(step) != 0:
        raise ValueError(f"step must be a scalar, got an array of shape {np.shape(step)}")
    if is_array and not is_real(step.dtype):
        raise TypeError(f"step must be a real number, got an array of {step.dtype}")


def is_real(dtype: Any) -> bool:
    """Whether numbers of a dtype can count steps."""
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def masks_of(state: Any, kind: type[tuple[Any, ...]], field: str = "masks") -> Masks:
    """The masks, or another field, of a method's state; raises TypeError if it is not one."""
    if not all(hasattr(state, field) for field in cast(Any, kind)._fields):
        raise TypeError(
            f"expected a state of type {kind.__name__}, as sparsifier.init(params, key) and "
            f"sparsifier.refresh(state, params, step) return it; got {type(state).__name__}"
        )
    return cast(Masks, getattr(state, field))


def part_of(opt_state: Any, kind: type[tuple[Any, ...]]) -> Any:
    """The state of one transformation within that of the whole optimizer.

    Raises:
      ValueError: the optimizer has no such part, or several.
    """
    fields = set(cast(Any, kind)._fields)

    # By its fields, because a checkpoint may give back another class with the same ones.
    def is_part(node: Any) -> bool:
        return fields <= set(getattr(node, "_fields", ()))

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_part) if is_part(node)]
    if len(found) != 1:
        raise ValueError(
            f"expected the state of an optimizer with one {kind.__name__}, that of the method's "
            f"transformation; found {len(found)}"
        )
    return found[0]


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
