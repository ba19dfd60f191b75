"""Dense training: the baseline, and the control for every method that becomes sparse late."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.methods.sparsifier import Sparsifier, check_steps, map_planned, scheduled, stateless
from nmjax.plans import Plan, check_plan
from nmjax.pruning import leaf_mask
from nmjax.ste import check_lambda, prune_ste, pull_pruned

if TYPE_CHECKING:
    import chex


def dense() -> Sparsifier:
    """Leaves the parameters unchanged, so that a dense baseline runs in the same training loop.

    >>> params = {"kernel": 1.0}
    >>> dense().apply(params, ()) is params
    True
    """
    return stateless(lambda params: params, lambda params: params)


def dense_then(plan: Plan, at_step: int, *, lambda_w: chex.Numeric | None = None) -> Sparsifier:
    """Trains dense until a step, and then with STE or SR-STE.

    Methods that become sparse gradually also train longer while the network is dense. This method
    does only that, so a gradual one should beat it at the same switch. It is also STEP without the
    frozen second moment.

    Args:
      plan: from `nmjax.make_plan`.
      at_step: optimizer step from which the forward pass is sparse. Call `refresh` then, or before
        every step.
      lambda_w: strength of SR-STE's pull from that step on, in the backward pass; None for STE.
        `nmjax.add_sparse_refined` would pull during the dense part, too.

    Returns:
      A sparsifier with state `Clock`.

    Raises:
      TypeError: `plan` is not a plan; `at_step` is not an integer; `lambda_w` is not a number.
      ValueError: `at_step` is negative; `lambda_w` is not finite.

    Source: the control that follows from Lu et al., "STEP: Learning N:M Structured Sparsity Masks
    from Scratch with Precondition", ICML 2023; STE as in Zhou et al., ICLR 2021.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> sparsifier = dense_then(nmjax.make_plan(params, "2:4"), 10)
    >>> state = sparsifier.init(params, jax.random.key(0))
    >>> for step in (9, 10):
    ...     state = sparsifier.refresh(state, params, step)
    ...     print(sparsifier.apply(params, state)["kernel"].ravel().tolist())
    [4.0, 3.0, 2.0, 1.0]
    [4.0, 3.0, 0.0, 0.0]
    """
    check_plan(plan)
    check_steps(at_step=at_step)
    if lambda_w is not None:
        check_lambda(lambda_w)

    def forward(params: chex.ArrayTree, step: jax.Array) -> chex.ArrayTree:
        def prune_leaf(name: str, w: jax.Array) -> jax.Array:
            # The mask is not computed while the network is dense.
            mask = lax.cond(
                step >= at_step,
                lambda w: leaf_mask(w, plan[name], plan.score),
                lambda w: jnp.ones_like(w, dtype=bool),
                lax.stop_gradient(w),
            )
            return prune_ste(w if lambda_w is None else pull_pruned(w, mask, lambda_w), mask)

        return map_planned(prune_leaf, params, plan)

    return scheduled(forward, plan, at_step)
