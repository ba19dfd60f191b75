"""Gradient transformations for sparse training, to be put into an optax chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from nmjax.plans import Plan
from nmjax.pruning import Masks, check_masks, leaf_mask, planned_leaves
from nmjax.ste import check_lambda, sparse_refined_term
from nmjax.trees.leaves import map_named

_NO_PARAMS = (
    "You are using a transformation that requires the current value of parameters, but you are "
    "not passing `params` when calling `update`."
)


class AddSparseRefinedState(NamedTuple):
    """State of `add_sparse_refined` where `lambda_w` is a schedule.

    Attributes:
      count: int32 scalar, number of updates so far.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count


def add_sparse_refined(
    plan: Plan, lambda_w: ArrayLike | Callable[[jax.Array], ArrayLike] = 2e-4
) -> optax.GradientTransformationExtraArgs:
    """Adds SR-STE's sparse-refined term to the gradient: a pull to zero on the pruned weights.

    `g + lambda_w * ~mask * w` for the planned leaves; others pass through. The mask is that of the
    parameters given to `update`, or the extra argument `masks=` (leaf name -> boolean array), for
    methods whose masks remember.

    Where it stands in the chain matters:

    - *First*, before momentum or Adam: the term is part of the gradient. This is SR-STE as
      published, and equals `prune_sr_ste` in the loss. Before `optax.clip_by_global_norm` the term
      is clipped with the gradient, after it the pull is not.
    - *After* `optax.scale_by_adam`, before the learning rate: the pull is decoupled, like AdamW's
      weight decay; a step shrinks a pruned weight by exactly `learning_rate * lambda_w`.

    Adam divides the first form by the root of its second moment. Without any other gradient the
    pull is then a step of the learning rate's size whatever `lambda_w` is, and small weights
    change sign:

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[1.0], [0.9], [0.1], [0.001]])}
    >>> plan = nmjax.make_plan(params, "2:4")
    >>> pull, adam, rate = add_sparse_refined(plan, 2e-4), optax.scale_by_adam(), optax.scale(-0.01)
    >>> for name, tx in {"before": (pull, adam, rate), "after": (adam, pull, rate)}.items():
    ...     update, _ = optax.chain(*tx).update(
    ...         jax.tree.map(jnp.zeros_like, params), optax.chain(*tx).init(params), params
    ...     )
    ...     change = (update["kernel"] / params["kernel"]).ravel()[2:]
    ...     print(name, "Adam, relative change:", [f"{c:.2g}" for c in change.tolist()])
    before Adam, relative change: ['-0.1', '-9.5']
    after Adam, relative change: ['-2e-06', '-2e-06']

    Under data parallelism add the term once, to the averaged gradient: in the optimizer it is.

    Args:
      plan: from `nmjax.make_plan`.
      lambda_w: strength, a number or a schedule of the update count. The paper uses 2e-4, with SGD
        at learning rate 0.1 over 120 epochs of ImageNet. Negative values push the pruned weights
        away from zero.

    Returns:
      A transformation whose state is `optax.EmptyState` for a number, `AddSparseRefinedState` for
      a schedule.

    Raises:
      ValueError: from `update`, without `params`, with parameters or masks that do not fit the
        plan, or with a `lambda_w` that is not a scalar. Leaves hidden by `optax.masked` or
        `optax.partition` are left alone.
      TypeError: from `update`, a mask that is not boolean.

    Source: Zhou et al., ICLR 2021; modelled on `optax.add_decayed_weights`.
    """

    def init(params: Any) -> optax.EmptyState | AddSparseRefinedState:
        del params
        return (
            AddSparseRefinedState(jnp.zeros([], jnp.int32))
            if callable(lambda_w)
            else optax.EmptyState()
        )

    def update(
        updates: Any,
        state: Any,
        params: Any | None = None,
        *,
        masks: Masks | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del extra_args
        if params is None:
            raise ValueError(_NO_PARAMS)
        strength = lambda_w(state.count) if callable(lambda_w) else lambda_w
        check_lambda(strength)
        planned = planned_leaves(params, plan, is_hidden=_is_masked_node)

        def add(name: str, g: Any, w: Any) -> Any:
            if name not in planned or g is None:
                return g
            mask = leaf_mask(w, plan[name], plan.score) if masks is None else masks[name]
            return g + sparse_refined_term(w, mask, strength)

        if masks is not None:
            hidden = plan.keys() - planned.keys()
            check_masks({name: masks[name] for name in masks if name not in hidden}, planned)
        updates = map_named(add, updates, params, is_leaf=lambda leaf: leaf is None)
        if callable(lambda_w):
            state = AddSparseRefinedState(optax.safe_increment(state.count))
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_masked_node(leaf: Any) -> bool:
    """Whether optax hides what stands here, as `optax.masked` and `optax.partition` do."""
    return isinstance(leaf, optax.MaskedNode)
