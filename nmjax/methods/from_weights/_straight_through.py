"""STE and SR-STE: masks that follow the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmjax.methods.sparsifier import Sparsifier, stateless
from nmjax.plans import Plan, check_plan
from nmjax.pruning import prune, sparsify
from nmjax.ste import check_lambda

if TYPE_CHECKING:
    import chex


def straight_through(plan: Plan, *, lambda_w: chex.Numeric | None = None) -> Sparsifier:
    """Recomputes the masks from the weights at every step; the gradient passes straight through.

    Args:
      plan: from `nmjax.make_plan`.
      lambda_w: None for STE, and for SR-STE with `nmjax.add_sparse_refined` in the optimizer; a
        number or scalar array for SR-STE in the backward pass, as in `nmjax.prune_sr_ste`.

    Raises:
      TypeError: `plan` is not a plan, or `lambda_w` is not a number.
      ValueError: `lambda_w` is not a scalar or not finite.

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From
    Scratch", ICLR 2021.
    """
    check_plan(plan)
    if lambda_w is not None:
        check_lambda(lambda_w)
    return stateless(
        lambda params: sparsify(params, plan, lambda_w=lambda_w),
        lambda params: prune(params, plan),
    )
