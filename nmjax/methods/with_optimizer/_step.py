"""STEP: dense Adam until its second moment has settled, then STE with that moment frozen."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from nmjax.masks.arguments import check_number
from nmjax.methods.sparsifier import (
    Method,
    Sparsifier,
    check_rates,
    check_steps,
    map_planned,
    masks_of,
    part_of,
)
from nmjax.packed.packing import check_pattern
from nmjax.plans import Plan, check_plan
from nmjax.pruning import leaf_mask, planned_leaves
from nmjax.ste import prune_ste
from nmjax.trees.leaves import named_leaves

if TYPE_CHECKING:
    import chex


class StepState(NamedTuple):
    """State of the sparsifier of `step`.

    Attributes:
      switched: boolean scalar, whether the forward pass is sparse.
    """

    switched: jax.Array


class ScaleByStepState(NamedTuple):
    """State of the transformation of `step`.

    Attributes:
      count: int32 scalar, number of updates so far.
      mu: first moments, like the parameters.
      nu: second moments; frozen once switched.
      changes: float32 (window,), the last measurements of the second moments, in a ring.
      switched: boolean scalar.
      switched_at: int32 scalar, number of updates that the second moments have seen.
    """

    # `count` hides tuple.count.
    count: jax.Array  # type: ignore[assignment]
    mu: chex.ArrayTree
    nu: chex.ArrayTree
    changes: jax.Array
    switched: jax.Array
    switched_at: jax.Array


def step(
    plan: Plan,
    min_steps: int,
    max_steps: int,
    *,
    switch: Literal["settled", "absolute", "absolute_geometric"] = "settled",
    threshold: float | None = None,
    correct_bias: bool = True,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Method:
    """STEP: learns Adam's second moment densely, and trains sparse with that moment frozen.

    Under STE the gradients are noisier, and so is the second moment that Adam divides by. STEP
    trains dense until the second moment v has settled, copies it to v*, and from then on divides by
    it while the forward pass is sparse:

        update = m_t / (1 - b1^t) / (sqrt(v_t / (1 - b2^t)) + eps)          before the switch
        update = m_t / (1 - b1^t) / (sqrt(v* / (1 - b2^k)) + eps^(3/4))     after it, at update k

    The transformation takes the place of `optax.scale_by_adam`; weight decay and the learning rate
    follow it. The switch happens after more than `max_steps` updates, or after more than
    `min_steps` once a measurement falls below `threshold`:

    - `"settled"`: the mean of v / (1 - b2^t) over the sparse leaves has changed by less than a
      fraction, 0.1 by default, over a window of 1 / (1 - b2) updates. It does not depend on the
      scale of the loss. This one is ours.
    - `"absolute"`: the average over the window of the mean of |v_t - v_{t-1}| is below eps, as
      published. With gradients of 1e-3 this holds at once, so that the switch is at `min_steps`;
      multiplying the loss by a constant moves it.
    - `"absolute_geometric"`: the same with the geometric mean over the weights.

    Args:
      plan: from `nmjax.make_plan`.
      min_steps: updates that are dense in any case; the authors recommend 10% of all.
      max_steps: updates that are dense at most; the authors recommend 50% of all.
      switch: what is measured.
      threshold: None for 0.1 or eps.
      correct_bias: False divides by v* itself, as published: after k = 100 updates at b2 = 0.999,
        steps are 3.2 times as long.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator.

    Returns:
      A sparsifier with state `StepState`, a transformation with state `ScaleByStepState`, and
      `follow`, which carries the switch over to the sparsifier after each update. Export raises
      before the switch. (The authors evaluate the dense part with masks; here its forward pass is
      dense.)

    Raises:
      TypeError: `plan` is not a plan; a number of steps is not an integer; another number is none.
      ValueError: not 0 <= min_steps < max_steps; `switch` is unknown; not 0 <= b1, b2 < 1.

    Source: Lu et al., "STEP: Learning N:M Structured Sparsity Masks from Scratch with
    Precondition", ICML 2023, which has no public code; the details are those of
    `sparse/adamw_step.py` in huyz2023/2by4-pretrain.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> sparsifier, scale_by_step, follow = step(nmjax.make_plan(params, "2:4"), 1, 2)
    >>> tx = optax.chain(scale_by_step, optax.scale_by_learning_rate(0.1))
    >>> state, opt_state = sparsifier.init(params, jax.random.key(0)), tx.init(params)
    >>> for _ in range(3):
    ...     print(sparsifier.apply(params, state)["kernel"].round(1).ravel().tolist())
    ...     updates, opt_state = tx.update(params, opt_state, params)
    ...     state = follow(state, opt_state)
    [4.0, 3.0, 2.0, 1.0]
    [4.0, 3.0, 2.0, 1.0]
    [4.0, 3.0, 2.0, 1.0]
    >>> sparsifier.export(params, state)["kernel"].ravel().tolist()
    [4.0, 3.0, 0.0, 0.0]
    """
    check_plan(plan)
    check_steps(min_steps=min_steps, max_steps=max_steps)
    if switch not in ("settled", "absolute", "absolute_geometric"):
        raise ValueError(
            f'switch must be "settled", "absolute" or "absolute_geometric", got {switch!r}'
        )
    check_rates(b1=b1, b2=b2)
    check_number("eps", eps)
    if threshold is None:
        threshold = 0.1 if switch == "settled" else eps
    check_number("threshold", threshold)

    window = max(round(1 / (1 - b2)), 1)
    measure = partial(_measure, plan, switch, b2)

    def is_due(changes: jax.Array, count: jax.Array, oldest: jax.Array) -> jax.Array:
        newest = changes[(count - 1) % window]
        if switch == "settled":
            # The ring held `oldest` where `newest` is now. Before it has gone round once, nothing
            # is known about a window.
            low = (count > window) & (jnp.abs(newest - oldest) < threshold * newest)
        else:
            filled = jnp.minimum(count, window)
            low = jnp.sum(changes) / filled.astype(changes.dtype) < threshold
        return (count > max_steps) | ((count > min_steps) & low)

    def init(params: chex.ArrayTree) -> ScaleByStepState:
        zeros = partial(optax.tree.zeros_like, params)
        return ScaleByStepState(
            jnp.zeros([], jnp.int32),
            zeros(),
            zeros(),
            jnp.zeros(window, jnp.float32),
            jnp.array(False),
            jnp.zeros([], jnp.int32),
        )

    def update(
        updates: chex.ArrayTree, state: ScaleByStepState, params: Any = None, **extra_args: Any
    ) -> tuple[chex.ArrayTree, ScaleByStepState]:
        del params, extra_args
        count = optax.safe_increment(state.count)
        frozen = state.switched
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        nu = jax.tree.map(lambda new, old: jnp.where(frozen, old, new), nu, state.nu)
        seen = jnp.where(frozen, state.switched_at, count)
        place = (count - 1) % window
        oldest = state.changes[place]
        changes = state.changes.at[place].set(measure(state.nu, nu, count))
        switched = frozen | is_due(changes, count, oldest)
        power = seen.astype(jnp.float32)
        correction = 1 - b2**power if correct_bias else jnp.where(frozen, 1.0, 1 - b2**power)
        small = jnp.where(frozen, eps**0.75, eps)
        momentum = 1 - b1 ** count.astype(jnp.float32)

        def direct(m: jax.Array, v: jax.Array) -> jax.Array:
            wide = np.promote_types(m.dtype, np.float32)
            given = (m, momentum, v, correction, small)
            mean, part, square, share, least = (x.astype(wide) for x in given)
            return (mean / part / (jnp.sqrt(square / share) + least)).astype(m.dtype)

        directed = jax.tree.map(direct, mu, nu)
        return directed, ScaleByStepState(count, mu, nu, changes, switched, seen)

    def follow(state: StepState, opt_state: chex.ArrayTree) -> StepState:
        del state
        return StepState(part_of(opt_state, ScaleByStepState).switched)

    return Method(
        _sparsifier(plan, max_steps), optax.GradientTransformationExtraArgs(init, update), follow
    )


def _measure(
    plan: Plan, switch: str, b2: float, before: Any, after: Any, count: jax.Array
) -> jax.Array:
    """What the switch looks at: one number for all sparse leaves together, float32."""
    old, new = (
        [leaf.astype(jnp.float32) for name, leaf in named_leaves(tree).items() if name in plan]
        for tree in (before, after)
    )
    size = sum(leaf.size for leaf in new)
    if switch == "settled":
        total = sum(jnp.sum(v) for v in new)
        return total / size / (1 - b2 ** count.astype(jnp.float32))
    changes = [jnp.abs(v - u) for u, v in zip(old, new, strict=True)]
    if switch == "absolute":
        return sum(jnp.sum(change) for change in changes) / size
    # A moment that does not change has no logarithm; the smallest normal number stands for 0.
    tiny = float(jnp.finfo(jnp.float32).tiny)
    logs = sum(jnp.sum(jnp.log(jnp.maximum(change, tiny))) for change in changes)
    return jnp.exp(logs / size)


def _sparsifier(plan: Plan, max_steps: int) -> Sparsifier:
    def init(params: chex.ArrayTree, key: chex.PRNGKey) -> StepState:
        del key
        planned_leaves(params, plan)
        return StepState(jnp.array(False))

    def apply(params: chex.ArrayTree, state: StepState) -> chex.ArrayTree:
        switched = jnp.asarray(masks_of(state, StepState, "switched"))

        def prune_leaf(name: str, w: jax.Array) -> jax.Array:
            # The mask is not computed while the network is dense.
            mask = lax.cond(
                switched,
                lambda w: leaf_mask(w, plan[name], plan.score),
                lambda w: jnp.ones_like(w, dtype=bool),
                lax.stop_gradient(w),
            )
            return prune_ste(w, mask)

        return map_planned(prune_leaf, params, plan)

    def export(params: chex.ArrayTree, state: StepState) -> chex.ArrayTree:
        sparse = apply(params, state)
        check_pattern(
            sparse,
            plan,
            "step has not switched to sparse training: it does after the update that settles the "
            f"second moment, at the latest after update {max_steps + 1}, and method.follow(state, "
            "opt_state) carries that over. These weights are not sparse yet",
        )
        return sparse

    return Sparsifier(init, lambda state, params, step: state, apply, export)
