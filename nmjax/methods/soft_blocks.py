"""Soft uniform block pruning: blocks dropped from scratch, with a chance to come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from nmjax.layouts import Axes
from nmjax.masks.blocks import keep_blocks, score_blocks, split_blocks, spread_blocks
from nmjax.masks.scores import BlockScore, block_score, magnitude
from nmjax.methods.schedules import Ramp
from nmjax.methods.sparsifiers import Params, Sparsifier
from nmjax.patterns import Block1xN
from nmjax.plans import Plan
from nmjax.pruning import planned_leaves, prune, sparsify

# The state holds raw key data, which any checkpoint takes; it is made for this generator.
_GENERATOR = "threefry2x32"
_ROUNDING = 1e-6  # A few times that of float32.


class SoftBlocksState(NamedTuple):
    """State of `soft_uniform_blocks`.

    Attributes:
      masks: leaf name -> boolean array; all True until the first refresh.
      key: uint32 (2,), the data of a random key that each refresh replaces.
    """

    masks: Mapping[str, jax.Array]
    key: jax.Array


def soft_uniform_blocks(
    plan: Plan,
    ramp: Ramp,
    *,
    score: str | BlockScore = "bpar",
    temperature: float = 1.0,
    variant: Literal["v1", "v2"] = "v2",
    soft: bool = True,
) -> Sparsifier:
    """SUBP: a growing number of blocks is dropped from every row; dropped ones may be drawn again.

    Each `refresh`, meant for the start of every epoch, goes row by row of C blocks:

    1. Drop the floor(p C) blocks of lowest score: the full final sparsity p from the first time on.
    2. Draw floor(p (1 - ramp(step)) C) of them to come back, without replacement, with
       probabilities softmax(s / |s|_2 / temperature) over the scores s of the dropped ones.

    So every row of a layer keeps the same number at any time: all before the ramp begins, and
    C - floor(p C) from its end on, when nothing is drawn any more. `ramp(step)` is the fraction of
    the final sparsity; with the paper's cubic one, `cubic_ramp(10 * steps, 180 * steps)`, a layer
    of 256 inputs at p = 66/128 keeps 254 blocks of each row in epoch 50, 236 in epoch 100, 196 in
    epoch 140, and 124 from epoch 180 on.

    The paper adds a pull of 2e-4 on the dropped weights: `nmjax.add_sparse_refined(plan, 2e-4)` in
    the optimizer, whose `update` is then given `masks=state.masks`.

    Args:
      plan: every leaf has a uniform `Block1xN`.
      ramp: optimizer step -> fraction of the final sparsity, from `nmjax.methods.schedules`.
      score: of blocks: `"bpar"`, `"l1"` (the default of the released code), `"l2"`, or a function
        as `nmjax.block_mask` takes.
      temperature: of the draw; the higher, the less it heeds the scores.
      variant: `"v2"`, the released default, scores the masked weights, in which dropped blocks rank
        last and come back only by being drawn: from the ramp's end on masks never change. `"v1"`
        scores the dense weights, and its masks follow them for good.
      soft: whether gradients pass straight through to dropped weights, as published, or stop.

    Returns:
      A sparsifier with state `SoftBlocksState`.

    Raises:
      TypeError: `score` is neither a name nor a function.
      ValueError: a leaf of the plan has another pattern (all are named); the plan has a score of
        its own; an unknown score or variant; a temperature that is not positive.

    Source: Xiang et al., "SUBP: Soft Uniform Block Pruning for 1xN Sparse CNNs Multithreading
    Acceleration", NeurIPS 2023, section 3, and `models/conv_type/regrow_uniform_block*.py` of
    JingyangXiang/SUBP. There V2 ranks dropped blocks last only as far as scores of zero weights do;
    here always.
    """
    score_of = block_score(score)
    layers = _layers(plan)
    if plan.score is not magnitude:
        raise ValueError(
            f"blocks are ranked by score=, not by the plan's score {plan.score}: make the plan "
            "without one"
        )
    if variant not in ("v1", "v2"):
        raise ValueError(f'variant must be "v1" or "v2", got {variant!r}')
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def init(params: Params, key: jax.Array) -> SoftBlocksState:
        leaves = planned_leaves(params, plan)
        masks = {name: jnp.ones_like(leaf, dtype=bool) for name, leaf in leaves.items()}
        return SoftBlocksState(masks, jax.random.bits(key, (2,), jnp.uint32))

    def refresh_layer(
        layer: _Layer, key: jax.Array, w: jax.Array, mask: jax.Array, remaining: jax.Array
    ) -> jax.Array:
        pattern, axes = layer
        scored = jnp.where(mask, w, 0) if variant == "v2" else w
        scores = score_blocks(lax.stop_gradient(scored), pattern.n, axes, score_of)
        rank = scores
        if variant == "v2":
            rank = jnp.where(split_blocks(mask, pattern.n, axes)[..., 0], scores, -jnp.inf)
        stay = keep_blocks(rank, pattern.kept_blocks(rank.shape[-1]))
        drawn = _draw(key, _logits(scores, ~stay) / temperature, ~stay, pattern, remaining)
        # `&` lays the new mask where the old one lies.
        return spread_blocks(stay | drawn, w.shape, pattern.n, axes) & jnp.ones_like(mask)

    def refresh(state: SoftBlocksState, params: Params, step: ArrayLike) -> SoftBlocksState:
        own = jax.random.wrap_key_data(state.key, impl=_GENERATOR)
        following, *keys = jax.random.split(own, 1 + len(plan))
        leaves = planned_leaves(params, plan)
        remaining = 1 - ramp(step)
        masks = {
            name: refresh_layer(layers[name], key, leaves[name], state.masks[name], remaining)
            for name, key in zip(plan, keys, strict=True)
        }
        return SoftBlocksState(masks, jax.random.key_data(following))

    def apply(params: Params, state: SoftBlocksState) -> Params:
        return (sparsify if soft else prune)(params, plan, state.masks)

    return Sparsifier(init, refresh, apply)


class _Layer(NamedTuple):
    pattern: Block1xN
    axes: Axes


def _layers(plan: Plan) -> dict[str, _Layer]:
    """The planned leaves, all of them with uniform blocks."""
    layers, others = {}, []
    for name, leaf in plan.items():
        if isinstance(leaf.pattern, Block1xN) and leaf.pattern.uniform:
            layers[name] = _Layer(leaf.pattern, leaf.axes)
        else:
            others.append(f"  {name} {leaf.shape}: {leaf.pattern}")
    if others:
        raise ValueError(
            "soft uniform blocks need a uniform pattern of blocks for every leaf, such as "
            '"1x16@0.5", but the plan has\n'
            + "\n".join(others)
            + "\nName them in exclude= of make_plan, or give them such a pattern in rules=."
        )
    return layers


def _logits(scores: jax.Array, dropped: jax.Array) -> jax.Array:
    """The scores of a row's dropped blocks over their L2 norm."""
    norm = jnp.linalg.norm(jnp.where(dropped, scores, 0), axis=-1, keepdims=True)
    return scores / jnp.where(norm > 0, norm, 1)


def _draw(
    key: jax.Array, logits: jax.Array, dropped: jax.Array, pattern: Block1xN, remaining: jax.Array
) -> jax.Array:
    """The dropped blocks that come back, `remaining` of the final number of dropped ones.

    The highest of log-probabilities with Gumbel noise are a sample without replacement, as if
    drawn one by one; the softmax's denominator changes no order. (Vieira 2014, "Gumbel-max trick
    and weighted reservoir sampling"; Kool et al., ICML 2019.)
    """
    inputs = logits.shape[-1]
    # A product that should be an integer may come out one rounding below it; and it must not
    # exceed the floor of the float64 product that the pattern goes by.
    product = pattern.sparsity * inputs * remaining * (1 + _ROUNDING)
    count = jnp.floor(product).astype(jnp.int32)
    count = jnp.minimum(count, inputs - pattern.kept_blocks(inputs))
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return keep_blocks(jnp.where(dropped, logits + noise, -jnp.inf), count)
