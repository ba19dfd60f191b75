"""Decaying masks: the pruned weights, or the pattern itself, fade in over the training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nmjax.masks.arguments import check_number
from nmjax.methods.sparsifier import Sparsifier, check_steps, map_planned, scheduled
from nmjax.patterns import NM, Pattern
from nmjax.plans import LeafPlan, Plan, check_plan
from nmjax.pruning import leaf_mask
from nmjax.ste import check_lambda, prune_ste, pull_pruned, replace_ste

if TYPE_CHECKING:
    import chex

Decay = Literal["exponential", "linear", "stepwise", "geometric", "densify"]
_STRUCTURE = ("stepwise", "geometric", "densify")


def decaying_mask(
    plan: Plan,
    begin: int,
    end: int,
    *,
    decay: Decay = "exponential",
    rate: float = 5.0,
    gradient: Literal["straight", "scaled"] = "straight",
    lambda_w: chex.Numeric | None = None,
) -> Sparsifier:
    """Fades pruned weights out: they keep a share beta of their value, which falls to zero.

    Masks come from the weights at every step. Early on, a pruned weight still contributes, so that
    the network settles on a mask before it depends on it. With x = (step - begin) / (end - begin),
    the forward pass computes

        w * (mask + beta * ~mask),   beta = 1 - x  ("linear")  or  exp(-rate * x)  ("exponential")

    with beta = 1 until `begin` and exactly 0 from `end` on. The structure decays instead with

    - `"stepwise"`: equal frames M-1:M, then (M/2):M, (M/4):M, ..., N:M: 15, 8, 4, 2 and 1 of 16;
    - `"geometric"`: four equal frames 8N:8M, 4N:4M, 2N:2M, N:M, at one density;
    - `"densify"`: N:8M, N:4M, N:2M, N:M, which is in the code but not in the paper.

    In a frame the masks are hard and the gradient is that of STE; the forward pass is dense until
    `begin`, and the last frame goes on after `end`. Call `refresh` before every step.

    Args:
      plan: from `nmjax.make_plan`; with a decaying structure, all its patterns are N:M.
      begin: optimizer step at which the decay begins.
      end: optimizer step at which the weights have the pattern.
      decay: what decays, and how.
      rate: of the exponential: beta ends at `exp(-rate)` before it is set to zero. The published
        rate of 1e-4 per step is `rate=1e-4 * (end - begin)`.
      gradient: `"straight"` passes the gradient to every weight, as the paper and the authors'
        PyTorch code do; `"scaled"` multiplies that of a pruned weight by beta, as the group's JAX
        code does, which has no gradient rule of its own.
      lambda_w: strength of SR-STE's pull on the weights that are pruned at this step, in the
        backward pass; None for none. `nmjax.add_sparse_refined` in the optimizer does the same
        where the mask decays.

    Returns:
      A sparsifier with state `Clock`. `export` raises before `end`: the published exponential never
      reaches the pattern.

    Raises:
      TypeError: `plan` is not a plan; `begin` or `end` is not an integer; `rate` or `lambda_w` is
        not a number.
      ValueError: not 0 <= begin < end; `rate` is not positive; `decay` or `gradient` is unknown;
        `lambda_w` is not finite; a leaf has no N:M pattern, or its groups do not fit in a frame,
        where the structure decays (the error lists all such leaves).

    Source: Kao et al., "Training Recipe for N:M Structured Sparsity with Decaying Pruning Mask",
    2022; Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in
    Transformers", 2024, and their code in `timm/sparse_pruning/sparse_functions.py` (straight) and
    `aqt/jax_legacy/jax/sparsity` (scaled). Theirs counts mask updates; this counts steps.

    >>> import jax, nmjax
    >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    >>> sparsifier = decaying_mask(nmjax.make_plan(params, "2:4"), 0, 10, decay="linear")
    >>> state = sparsifier.init(params, jax.random.key(0))
    >>> halfway, done = (sparsifier.refresh(state, params, step) for step in (5, 10))
    >>> sparsifier.apply(params, halfway)["kernel"].ravel().tolist()
    [4.0, 3.0, 1.0, 0.5]
    >>> sparsifier.export(params, done)["kernel"].ravel().tolist()
    [4.0, 3.0, 0.0, 0.0]
    """
    _check_arguments(plan, begin, end, decay, rate, gradient, lambda_w)
    if decay in _STRUCTURE:
        frames = {name: _frames(leaf.pattern, decay) for name, leaf in plan.items()}
        _check_frames(plan, frames)
        starts = {name: _starts(begin, end, len(patterns)) for name, patterns in frames.items()}
        forward = partial(_in_frames, plan, frames, starts, lambda_w)
        end = max((int(steps[-1]) for steps in starts.values()), default=end)
    else:
        beta = partial(_beta, begin, end, rate if decay == "exponential" else None)
        forward = partial(_faded, plan, beta, gradient == "scaled", lambda_w)
    return scheduled(forward, plan, end)


def _beta(begin: int, end: int, rate: float | None, step: jax.Array) -> jax.Array:
    """What a pruned weight keeps of its value: float32, exactly 1 and 0 at the ends."""
    x = (step.astype(jnp.float32) - begin) / (end - begin)
    inside = 1 - x if rate is None else jnp.exp(-rate * x)
    return jnp.where(step >= end, 0.0, jnp.where(step <= begin, 1.0, inside))


def _faded(
    plan: Plan,
    beta_at: Callable[[jax.Array], jax.Array],
    is_scaled: bool,
    lambda_w: chex.Numeric | None,
    params: chex.ArrayTree,
    step: jax.Array,
) -> chex.ArrayTree:
    beta = beta_at(step)

    def fade(w: jax.Array, mask: jax.Array) -> jax.Array:
        # At 0 a selection, not a product: a pruned weight that is not finite must become zero.
        rest = jnp.where(beta > 0, beta.astype(w.dtype) * w, 0)
        return jnp.where(mask, w, rest)

    def soften(w: jax.Array, mask: jax.Array) -> jax.Array:
        if lambda_w is not None:
            w = pull_pruned(w, mask, lambda_w)
        return fade(w, mask) if is_scaled else replace_ste(w, lax.stop_gradient(fade(w, mask)))

    return map_planned(
        lambda name, w: soften(w, leaf_mask(w, plan[name], plan.score)), params, plan
    )


def _in_frames(
    plan: Plan,
    frames: dict[str, list[Pattern]],
    starts: dict[str, np.ndarray],
    lambda_w: chex.Numeric | None,
    params: chex.ArrayTree,
    step: jax.Array,
) -> chex.ArrayTree:
    def prune_leaf(name: str, w: jax.Array) -> jax.Array:
        def mask_of(pattern: Pattern) -> Callable[[jax.Array], jax.Array]:
            leaf = dataclasses.replace(plan[name], pattern=pattern)
            return lambda w: leaf_mask(w, leaf, plan.score)

        # Only the mask of this frame is computed. Frame 0 is dense.
        branches = [lambda w: jnp.ones_like(w, dtype=bool), *map(mask_of, frames[name])]
        frame = jnp.sum(step >= jnp.asarray(starts[name]), dtype=jnp.int32)
        mask = lax.switch(frame, branches, lax.stop_gradient(w))
        return prune_ste(w if lambda_w is None else pull_pruned(w, mask, lambda_w), mask)

    return map_planned(prune_leaf, params, plan)


def _starts(begin: int, end: int, frames: int) -> np.ndarray:
    """The first step of each of some equal frames, int32."""
    # Integers, so that a frame begins at the same step everywhere.
    return np.array([begin - (-(end - begin) * i // frames) for i in range(frames)], np.int32)


def _frames(pattern: Pattern, decay: str) -> list[Pattern]:
    """The patterns of the frames, from the loosest to the plan's own; none for other patterns."""
    if not isinstance(pattern, NM):
        return []
    n, m = pattern.n, pattern.m
    if decay == "stepwise":
        halves = (m >> i for i in range(1, m.bit_length()))
        kept = [m - 1, *(half for half in halves if n < half < m - 1)]
        return [*(dataclasses.replace(pattern, n=k) for k in kept if k > n), pattern]
    sizes = [(n * k if decay == "geometric" else n, m * k) for k in (8, 4, 2, 1)]
    return [dataclasses.replace(pattern, n=n, m=m) for n, m in sizes]


def _check_frames(plan: Plan, frames: dict[str, list[Pattern]]) -> None:
    """Raises ValueError unless every leaf has frames, and its shape fits all of them."""

    def complaint(leaf: LeafPlan, patterns: list[Pattern]) -> str | None:
        if not patterns:
            return f"its pattern is {leaf.pattern}, which has no M"
        misfits = (dataclasses.replace(leaf, pattern=pattern).misfit for pattern in patterns)
        return next((misfit for misfit in misfits if misfit), None)

    found = {name: complaint(plan[name], patterns) for name, patterns in frames.items()}
    if any(found.values()):
        raise ValueError(
            "the structure cannot decay for these leaves:\n"
            + "\n".join(
                f"  {name} {plan[name].shape}: {text}" for name, text in found.items() if text
            )
            + '\nGive them another pattern in rules= of make_plan, or use decay="exponential".'
        )


def _check_arguments(
    plan: Plan,
    begin: int,
    end: int,
    decay: str,
    rate: float,
    gradient: str,
    lambda_w: chex.Numeric | None,
) -> None:
    check_plan(plan)
    check_steps(begin=begin, end=end)
    if decay not in get_args(Decay):
        raise ValueError(f"decay must be one of {', '.join(get_args(Decay))}; got {decay!r}")
    if gradient not in ("straight", "scaled"):
        raise ValueError(f'gradient must be "straight" or "scaled", got {gradient!r}')
    if gradient == "scaled" and decay in _STRUCTURE:
        raise ValueError(
            f'gradient="scaled" needs a mask that decays, and decay={decay!r} has none'
        )
    check_number("rate", rate)
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be positive, got {rate}")
    if lambda_w is not None:
        check_lambda(lambda_w)
