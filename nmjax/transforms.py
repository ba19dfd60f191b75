"""Optax transformations for sparse training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nmjax.optax_chains import runs_after_flipped_sign
from nmjax.plans import Plan, check_plan
from nmjax.pruning import Masks, check_are_masks, check_masks, is_below, planned_leaves, prune_leaf
from nmjax.ste import apply_mask, check_lambda, sparse_refined_term
from nmjax.trees.leaves import map_named, named_leaves

if TYPE_CHECKING:
    import chex

# The words of `optax`'s own message, which is not part of its public API.
NO_PARAMS = (
    "You are using a transformation that requires the current value of parameters, but you are "
    "not passing `params` when calling `update`."
)
_FLIPPED = (
    "nmjax.add_sparse_refined comes after the learning rate in this optax.chain. The sign of the "
    "updates has been flipped there, so the term pushes pruned weights away from zero. Put it "
    "first: optax.chain(nmjax.add_sparse_refined(plan), optax.sgd(learning_rate))"
)


class AddSparseRefinedState(NamedTuple):
    """State of `add_sparse_refined` if `lambda_w` is a schedule.

    Attributes:
      count: int32 scalar, number of updates so far.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, not tuple.count


def add_sparse_refined(
    plan: Plan, lambda_w: chex.Numeric | Callable[[chex.Numeric], chex.Numeric] = 2e-4
) -> optax.GradientTransformationExtraArgs:
    """Adds SR-STE's term `lambda_w * ~mask * w` to the gradients of the planned leaves.

    Put it before the learning rate, where updates still point along the gradient:

        optax.chain(nmjax.add_sparse_refined(plan, 2e-4), optax.sgd(0.1, momentum=0.9))

    After `optax.sgd` or another whole optimizer, the sign has been flipped already, and the term
    would push pruned weights away from zero. `update` warns if it sees that in its `optax.chain`.
    It does not see it if the optimizer is in `optax.inject_hyperparams`, `optax.partition`, or a
    transformation of your own, if the chain is an `optax.named_chain`, or if a part that may flip
    the sign back follows.

    First in the chain, this is SR-STE as published, the same as `prune_sr_ste` in the loss. After
    `optax.scale_by_adam` it is decoupled, like AdamW's weight decay: a step shrinks a pruned weight
    by the fraction `learning_rate * lambda_w`. Before Adam the term is normalized with the
    gradient: where the rest of the gradient is zero, a pruned weight moves by the learning rate,
    regardless of `lambda_w`. A transformation that clips gradients clips the term too if it comes
    later in the chain.

    Args:
      plan: from `nmjax.make_plan`.
      lambda_w: strength, a finite number or a schedule of the update count. The paper uses 2e-4
        with SGD at learning rate 0.1. A negative value pushes pruned weights away from zero.

    Returns:
      A transformation with state `optax.EmptyState`, or `AddSparseRefinedState` for a schedule.
      `update` needs `params` and computes the masks from them, or takes them as `masks=` (leaf
      name -> boolean array). Leaves hidden by `optax.masked` or `optax.partition` are skipped.

    Raises:
      ValueError: `lambda_w` is not a scalar or not finite; from `update`: no `params`, or
        parameters, updates or masks that do not fit the plan.
      TypeError: `plan` is not a plan; `lambda_w` is not a number; from `update`: a mask is not
        boolean.

    Source: Zhou et al., ICLR 2021; modeled on `optax.add_decayed_weights`.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[1.0], [0.5], [0.25], [0.125]])}
    >>> tx = add_sparse_refined(nmjax.make_plan(params, "2:4"), 0.5)
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> updates["kernel"].ravel().tolist()
    [0.0, 0.0, 0.125, 0.0625]
    """
    check_plan(plan)
    if not callable(lambda_w):
        check_lambda(lambda_w)

    def init(params: chex.ArrayTree) -> optax.EmptyState | AddSparseRefinedState:
        del params
        return (
            AddSparseRefinedState(jnp.zeros([], jnp.int32))
            if callable(lambda_w)
            else optax.EmptyState()
        )

    def update(
        updates: chex.ArrayTree,
        state: optax.EmptyState | AddSparseRefinedState,
        params: chex.ArrayTree | None = None,
        *,
        masks: Masks | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, optax.EmptyState | AddSparseRefinedState]:
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS)
        strength = lambda_w(state.count) if callable(lambda_w) else lambda_w
        check_lambda(strength)
        planned = _planned(params, plan)

        _check_updates(updates, planned)
        if isinstance(lambda_w, int | float) and lambda_w > 0 and runs_after_flipped_sign():
            warnings.warn(_FLIPPED, stacklevel=2)

        def add(name: str, g: Any, w: Any) -> Any:
            if name not in planned or g is None:
                return g
            # The forward pass has computed the same sparse weights, so XLA computes them once.
            sparse = (
                prune_leaf(w, plan[name], plan.score)
                if masks is None
                else apply_mask(w, masks[name])
            )
            return g + sparse_refined_term(w, sparse, strength)

        if masks is not None:
            check_are_masks(masks)
            # Inside `optax.masked` a caller still passes the masks of the whole model.
            hidden = plan.keys() - planned.keys()
            check_masks({name: masks[name] for name in masks if name not in hidden}, planned)
        # None stands for "no gradient" and is not a leaf to JAX; `params` has a leaf there.
        updates = map_named(add, updates, params, is_leaf=lambda leaf: leaf is None)
        if callable(lambda_w):
            state = AddSparseRefinedState(optax.safe_increment(state.count))
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def _planned(params: chex.ArrayTree, plan: Plan) -> dict[str, jax.Array]:
    """`planned_leaves`, with one more way out: an optimizer may have only adapters."""
    try:
        return planned_leaves(params, plan, is_hidden=_is_masked_node)
    except ValueError as error:
        if plan.keys() & named_leaves(params).keys():
            raise
        raise ValueError(
            f"{error} If these parameters do not include the planned weights because those are "
            "frozen, leave add_sparse_refined out of the optimizer."
        ) from error


def _check_updates(updates: chex.ArrayTree, planned: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError unless every planned leaf has an update or None."""
    found = named_leaves(updates, is_leaf=lambda x: x is None or _is_masked_node(x))
    # None may stand for a whole subtree without gradients.
    empty = [name for name, leaf in found.items() if leaf is None]
    missing = [
        name
        for name in planned
        if name not in found and not any(is_below(name, node) for node in empty)
    ]
    if missing:
        raise ValueError(
            "the updates must have the tree of the parameters, but they have no leaf named "
            + ", ".join(missing)
        )
    wrong = [n for n in planned if found.get(n) is not None and not hasattr(found[n], "dtype")]
    if wrong:
        raise TypeError(
            "updates must be arrays, but "
            + ", ".join(f"{name} is of type {type(found[name]).__name__}" for name in wrong)
        )


def _is_masked_node(leaf: Any) -> bool:
    """Whether `optax.masked` or `optax.partition` hides this leaf."""
    return isinstance(leaf, optax.MaskedNode)
