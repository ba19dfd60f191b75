"""Soft uniform block pruning (SUBP): blocks are dropped during training and can come back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nmjax.layouts.axes import Axes
from nmjax.masks.arguments import as_fraction, check_number
from nmjax.masks.blocks import keep_blocks, score_blocks, split_blocks, spread_blocks
from nmjax.masks.scores import BlockScore, block_angular_redundancy, block_score, magnitude
from nmjax.methods.schedules import Ramp, remaining
from nmjax.methods.sparsifier import Sparsifier, check_step, export_masked, masks_of
from nmjax.patterns import Block1xN, is_blocks
from nmjax.plans import Plan, check_plan
from nmjax.pruning import planned_leaves, prune, sparsify

if TYPE_CHECKING:
    import chex
    from jaxtyping import Array, Bool, Float, Int32

# The state holds raw key data, which every checkpoint format can store. Raw data does not say
# which generator it belongs to, so the generator is fixed here.
_GENERATOR = "threefry2x32"

_UNFINISHED = (
    "soft_uniform_blocks reaches the pattern in the first refresh at or after the end of the ramp. "
    "Train until then, or end the ramp earlier."
)


class SoftBlocksState(NamedTuple):
    """State of `soft_uniform_blocks`.

    Attributes:
      masks: leaf name -> boolean array; all True until the first refresh.
      key: uint32 (2,), data of the random key for the next refresh.
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
    """SUBP: drops a growing number of blocks from every row; dropped blocks can be drawn again.

    Call `refresh` at the start of every epoch. For each row of C blocks it does the following:

    1. Drop the floor(p C) blocks with the lowest scores. p is the final sparsity, even at the
       first refresh.
    2. Draw floor(p (1 - ramp(step)) C) of the dropped blocks, without replacement, and restore
       them. The probabilities are softmax(s / |s|_2 / temperature), where s are the scores of the
       dropped blocks.

    So all rows of a layer keep the same number of blocks: all C before the ramp begins, and
    C - floor(p C) after it ends, when no block is drawn. `ramp(step)` is the fraction of the final
    sparsity. With the paper's ramp, `cubic_ramp(10 * steps, 180 * steps)`, a layer with 256 inputs
    and p = 66/128 keeps 254 blocks per row in epoch 50, 236 in epoch 100, 196 in epoch 140, and
    124 from epoch 180 on.

    The paper also decays the dropped weights by 2e-4: put `nmjax.add_sparse_refined(plan, 2e-4)`
    in the optimizer and pass `masks=state.masks` to its `update`.

    Args:
      plan: every leaf has a uniform `Block1xN` pattern.
      ramp: optimizer step -> fraction of the final sparsity, from `nmjax.methods.schedules`.
      score: how blocks are ranked: `"bpar"`, `"l1"` (the default of the released code), `"l2"`, or
        a function as in `nmjax.block_mask`.
      temperature: temperature of the draw; the higher it is, the less the scores matter.
      variant: `"v2"`, the default of the released code, scores the masked weights: dropped blocks
        rank last and return only when drawn, so masks are fixed once the ramp ends. `"v1"` scores
        the dense weights, and its masks keep following them. With `"bpar"`, `"v1"` takes only the
        sizes from the dense weights, and the angles from the masked ones: a dropped block counts
        as wholly redundant and seldom returns without being drawn.
      soft: True lets gradients pass straight through to dropped weights, as published; False stops
        them.

    Returns:
      A sparsifier with state `SoftBlocksState`.

    Raises:
      TypeError: `plan` is not a plan; `ramp` is not a function; `score` is neither a name nor a
        function; `temperature` is not a number; `soft` is not a bool.
      ValueError: a leaf has another kind of pattern (the error lists all such leaves); the plan
        has its own score; `score` or `variant` is unknown; `temperature` is not positive.

    Source: Xiang et al., "SUBP: Soft Uniform Block Pruning for 1xN Sparse CNNs Multithreading
    Acceleration", NeurIPS 2023, section 3, and `models/conv_type/regrow_uniform_block*.py` of
    JingyangXiang/SUBP. Its V2 ranks dropped blocks by the score of zero weights, which is not
    always the lowest; here they always rank last. Its counts of blocks are rounded in float64;
    ours are exact.
    """
    _check_arguments(plan, ramp, variant, temperature, soft)
    refresh_layer = partial(
        _refresh_layer,
        ramp=ramp,
        score=block_score(score),
        temperature=temperature,
        variant=variant,
    )
    layers = _layers(plan)

    def refresh(
        state: SoftBlocksState, params: chex.ArrayTree, step: chex.Numeric
    ) -> SoftBlocksState:
        check_step(step)
        masks_of(state, SoftBlocksState)
        own = jax.random.wrap_key_data(state.key, impl=_GENERATOR)
        next_key, *keys = jax.random.split(own, 1 + len(plan))
        leaves = planned_leaves(params, plan)
        masks = {
            name: refresh_layer(layers[name], key, leaves[name], state.masks[name], step)
            for name, key in zip(plan, keys, strict=True)
        }
        return SoftBlocksState(masks, jax.random.key_data(next_key))

    def apply(params: chex.ArrayTree, state: SoftBlocksState) -> chex.ArrayTree:
        return (sparsify if soft else prune)(params, plan, masks_of(state, SoftBlocksState))

    def export(params: chex.ArrayTree, state: SoftBlocksState) -> chex.ArrayTree:
        masks = masks_of(state, SoftBlocksState)
        return export_masked(params, plan, masks, _UNFINISHED)

    return Sparsifier(partial(_init, plan), refresh, apply, export)


def _check_arguments(plan: Plan, ramp: Ramp, variant: str, temperature: float, soft: bool) -> None:
    """Raises TypeError or ValueError unless these fit `soft_uniform_blocks`."""
    check_plan(plan)
    if not callable(ramp):
        raise TypeError(
            "ramp must be a function of the step, such as nmjax.cubic_ramp(begin, end); got "
            f"{type(ramp).__name__}"
        )
    if plan.score is not magnitude:
        raise ValueError(
            f"soft_uniform_blocks ranks blocks by its own score=, but the plan has the score "
            f"{plan.score}; make the plan without score="
        )
    if variant not in ("v1", "v2"):
        raise ValueError(f'variant must be "v1" or "v2", got {variant!r}')
    check_number("temperature", temperature)
    if not isinstance(soft, bool):
        raise TypeError(f"soft must be True or False, got {soft!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _init(plan: Plan, params: chex.ArrayTree, key: chex.PRNGKey) -> SoftBlocksState:
    leaves = planned_leaves(params, plan)
    masks = {name: jnp.ones_like(leaf, dtype=bool) for name, leaf in leaves.items()}
    # The caller's key may belong to another generator; random bits of it seed ours.
    return SoftBlocksState(masks, jax.random.bits(key, (2,), jnp.uint32))


class _Layer(NamedTuple):
    pattern: Block1xN
    axes: Axes


def _layers(plan: Plan) -> dict[str, _Layer]:
    """The planned leaves; raises ValueError unless all have uniform blocks."""
    layers, others = {}, []
    for name, leaf in plan.items():
        if is_blocks(leaf.pattern) and leaf.pattern.uniform:
            layers[name] = _Layer(leaf.pattern, leaf.axes)
        else:
            others.append(f"  {name} {leaf.shape}: {leaf.pattern}")
    if others:
        raise ValueError(
            'soft_uniform_blocks needs uniform blocks such as "1x16@0.5" for every leaf, but these '
            "leaves have other patterns:\n"
            + "\n".join(others)
            + "\nList them in exclude= of make_plan, or give them such a pattern in rules=."
        )
    return layers


def _refresh_layer(
    layer: _Layer,
    key: chex.PRNGKey,
    w: Float[chex.Array, "*shape"],
    mask: Bool[chex.Array, "*shape"],
    step: chex.Numeric,
    *,
    ramp: Ramp,
    score: BlockScore,
    temperature: float,
    variant: str,
) -> Bool[Array, "*shape"]:
    pattern, axes = layer
    # A block is kept or dropped as a whole, so the mask of its first weight is enough.
    kept = split_blocks(mask, pattern.n, axes)[..., 0]
    scored = jnp.where(mask, w, 0) if variant == "v2" else w
    if variant == "v1" and score is block_angular_redundancy:
        score = partial(block_angular_redundancy, kept=kept)
    scores = score_blocks(lax.stop_gradient(scored), pattern.n, axes, score)
    # Zeros need not have the lowest score, so the blocks that V2 has dropped get -inf.
    rank = jnp.where(kept, scores, -jnp.inf) if variant == "v2" else scores
    stay = keep_blocks(rank, pattern.kept_blocks(rank.shape[-1]))
    count = remaining(ramp, step, as_fraction(pattern.sparsity) * rank.shape[-1])
    drawn = _draw(key, _logits(scores, ~stay) / temperature, ~stay, count)
    # `&` gives the new mask the sharding of the old one.
    return spread_blocks(stay | drawn, w.shape, pattern.n, axes) & jnp.ones_like(mask)


def _logits(
    scores: Float[Array, "*stack rows inputs"], dropped: Bool[Array, "*stack rows inputs"]
) -> Float[Array, "*stack rows inputs"]:
    """The scores divided by the L2 norm of the row's dropped ones."""
    norm = jnp.linalg.norm(jnp.where(dropped, scores, 0), axis=-1, keepdims=True)
    # Zero norm: nothing was dropped, or only zeros. All logits are then zero, a uniform draw.
    return scores / jnp.where(norm > 0, norm, 1)


def _draw(
    key: chex.PRNGKey,
    logits: Float[Array, "*stack rows inputs"],
    dropped: Bool[Array, "*stack rows inputs"],
    count: Int32[Array, ""],
) -> Bool[Array, "*stack rows inputs"]:
    """Draws `count` of the dropped blocks of each row, which come back."""
    # Gumbel top-k: the highest logits plus Gumbel noise are a sample without replacement. One
    # selection per row replaces a loop of draws, and the count may be traced. The softmax is never
    # computed: its denominator is the same for the whole row and does not change the order.
    # (Vieira 2014, "Gumbel-max trick and weighted reservoir sampling"; Kool et al., ICML 2019.)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    # Blocks that stay anyway get -inf, so that they do not use up draws.
    return keep_blocks(jnp.where(dropped, logits + noise, -jnp.inf), count)
