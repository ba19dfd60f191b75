"""Distributes a budget of weights over layers: N of N:M for each of them."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from nmjax.masks.arguments import check_number
from nmjax.masks.scores import score_weights
from nmjax.patterns.nm import NM
from nmjax.plans import LeafPlan, Plan
from nmjax.pruning import check_leaves_have_values, leaf_mask, planned_leaves

if TYPE_CHECKING:
    import chex

# How many of every m weights each leaf keeps, by name.
_Counts = dict[str, int]


def allocate(
    params: chex.ArrayTree,
    plan: Plan,
    budget: float,
    method: Literal["erk", "greedy"] = "erk",
) -> dict[str, NM | None]:
    """Chooses n of n:m for each planned leaf, so that all together keep no more than a budget.

    "erk" (Erdos-Renyi kernel) gives each leaf the density

        min(1, c (inputs + outputs + taps) / (inputs * outputs * taps)),

    with the sizes of all taps axes in the sum, one c for all leaves, and n rounded to a power of
    two, or m. It needs shapes only. "greedy" starts from n = m everywhere, and lowers the n that
    loses the least score for each weight that it saves, until the budget holds.

    Args:
      params: parameters that fit the plan.
      plan: from `nmjax.make_plan`, with N:M patterns; each leaf keeps its m. `plan.score` ranks the
        weights for "greedy".
      budget: fraction of the planned weights that is kept, 0 < budget <= 1.
      method: "erk" or "greedy".

    Returns:
      Path rule -> pattern for `make_plan(..., rules=)`; None for leaves that stay dense.

    Raises:
      TypeError: `budget` is not a number; "greedy" inside `jax.jit`, where weights have no values.
      ValueError: not 0 < budget <= 1, or 1:m everywhere is above it; the method is unknown; a
        pattern is not N:M; `params` do not fit the plan; scores are NaN or infinite.

    Source: ERK: Evci et al., "Rigging the Lottery", ICML 2020, section 3. Ours rounds.

    >>> import nmjax
    >>> params = {"a": {"kernel": jnp.ones((64, 64))}, "b": {"kernel": jnp.ones((16, 16))}}
    >>> rules = allocate(params, nmjax.make_plan(params, "1:8"), 0.25)
    >>> {rule: str(pattern) for rule, pattern in rules.items()}
    {'^a/kernel$': '1:8', '^b/kernel$': 'None'}
    """
    check_number("budget", budget)
    if not 0 < budget <= 1:
        raise ValueError(f"budget is the fraction of weights kept, 0 < budget <= 1, got {budget}")
    leaves = planned_leaves(params, plan)
    others = [f"{name} ({leaf.pattern})" for name, leaf in plan.items() if _nm(leaf) is None]
    if others:
        raise ValueError(
            f"only N:M patterns have an n to choose, but there are {', '.join(others)}"
        )
    sizes = {name: math.prod(leaf.shape) for name, leaf in leaves.items()}
    limit = budget * sum(sizes.values())
    least = _kept(plan, sizes, dict.fromkeys(sizes, 1))
    if least > limit:
        raise ValueError(
            f"budget={budget} is too small: 1:m in every leaf keeps a fraction of "
            f"{least / sum(sizes.values()):.4f}; plan larger groups"
        )
    if method == "erk":
        counts = _by_erk(plan, sizes, limit)
    elif method == "greedy":
        counts = _by_score(leaves, plan, sizes, limit)
    else:
        raise ValueError(f'method must be "erk" or "greedy", got {method!r}')
    return {f"^{re.escape(name)}$": _with_count(plan[name], n) for name, n in counts.items()}


def _by_erk(plan: Plan, sizes: dict[str, int], limit: float) -> _Counts:
    shares = {name: _erk_share(plan[name]) for name in sizes}
    low, high = 0.0, 1 / min(shares.values())
    for _ in range(60):  # Bisection: the kept weights grow with c.
        c = (low + high) / 2
        total = sum(size * min(1, c * shares[name]) for name, size in sizes.items())
        low, high = (c, high) if total <= limit else (low, c)
    density = {name: min(1, low * share) for name, share in shares.items()}
    counts = dict.fromkeys(sizes, 1)
    # Rounded down, and then the leaves that lack most get more, as long as there is budget.
    while True:
        raised = {}
        for name, n in counts.items():
            after = counts | {name: _next(n, _size(plan[name]))}
            if n < _size(plan[name]) and _kept(plan, sizes, after) <= limit * (1 + 1e-9):
                raised[name] = after
        lacking = {name: density[name] * _size(plan[name]) / counts[name] for name in raised}
        best = max(lacking, key=lambda name: lacking[name], default=None)
        if best is None or lacking[best] <= 1:
            return counts
        counts = raised[best]


def _erk_share(leaf: LeafPlan) -> float:
    taps = [leaf.shape[axis] for axis in leaf.tap_axes]
    return (leaf.inputs + leaf.outputs + sum(taps)) / (leaf.inputs * leaf.outputs * math.prod(taps))


def _by_score(
    leaves: dict[str, jax.Array], plan: Plan, sizes: dict[str, int], limit: float
) -> _Counts:
    _check_scores(leaves, plan)
    scores = {name: _kept_scores(w, plan[name], plan) for name, w in leaves.items()}
    counts = {name: _size(plan[name]) for name in leaves}
    while _kept(plan, sizes, counts) > limit * (1 + 1e-9):
        loss = {}
        for name, n in counts.items():
            if n > 1:
                lower = _below(n)
                saved = sizes[name] * (n - lower) / _size(plan[name])
                loss[name] = (scores[name][n] - scores[name][lower]) / saved
        name = min(loss, key=lambda name: loss[name])
        counts[name] = _below(counts[name])
    return counts


def _check_scores(leaves: dict[str, jax.Array], plan: Plan) -> None:
    check_leaves_have_values(leaves)
    if any(isinstance(w, jax.core.Tracer) for w in leaves.values()):
        raise TypeError(
            'method="greedy" depends on the values of the weights, which are unknown inside '
            'jax.jit: allocate outside, or by "erk", which needs only shapes'
        )
    wrong = [n for n, w in leaves.items() if not jnp.isfinite(score_weights(w, plan.score)).all()]
    if wrong:
        raise ValueError(
            f"scores must be finite, but some of {', '.join(wrong)} are NaN or infinite"
        )


def _kept_scores(w: jax.Array, leaf: LeafPlan, plan: Plan) -> dict[int, float]:
    """The sum of the scores that each n keeps."""
    score = score_weights(w, plan.score).astype(jnp.float32)
    n, found = _size(leaf), {}
    while n >= 1:
        pattern = dataclasses.replace(leaf.pattern, n=n)  # type: ignore[type-var]
        mask = leaf_mask(w, dataclasses.replace(leaf, pattern=pattern), plan.score)
        found[n] = float(jnp.sum(jnp.where(mask, score, 0)))
        n = _below(n)
    return found


def _kept(plan: Plan, sizes: dict[str, int], counts: _Counts) -> float:
    return sum(size * counts[name] / _size(plan[name]) for name, size in sizes.items())


def _nm(leaf: LeafPlan) -> NM | None:
    return leaf.pattern if isinstance(leaf.pattern, NM) else None


def _size(leaf: LeafPlan) -> int:
    pattern = _nm(leaf)
    return 1 if pattern is None else pattern.m


def _with_count(leaf: LeafPlan, n: int) -> NM | None:
    pattern = _nm(leaf)
    return None if pattern is None or n == pattern.m else dataclasses.replace(pattern, n=n)


def _next(n: int, m: int) -> int:
    """The next power of two, or m."""
    return min(2 * n, m)


def _below(n: int) -> int:
    """The largest power of two below n; 0 below 1."""
    return 1 << (n - 1).bit_length() - 1 if n > 1 else 0
