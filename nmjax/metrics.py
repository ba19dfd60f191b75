"""Measures of how a topology changes (SAD, flip rate) and of what is kept (density, balance).

Everything that returns arrays works under `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from nmjax.masks.blocks import split_blocks
from nmjax.patterns import is_blocks
from nmjax.plans import Plan, check_plan
from nmjax.pruning import Masks, check_are_masks, check_masks, fits

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float32, Int32


class RowBalance(NamedTuple):
    """How many blocks the rows of one layer keep. Threads get equal work if the two are equal.

    Attributes:
      fewest: int32 scalar, blocks kept in the row that keeps the fewest.
      most: int32 scalar, blocks kept in the row that keeps the most.
    """

    fewest: jax.Array
    most: jax.Array


def sad(masks_a: Masks, masks_b: Masks | None = None) -> dict[str, Int32[Array, ""]]:
    """Sparse Architecture Divergence of each layer: the number of mask entries that differ.

    Compares two moments of one training run, or two runs. One swap inside a group changes two
    entries, and both count.

    Args:
      masks_a: leaf name -> boolean array, as from `nmjax.compute_masks`.
      masks_b: masks of the same leaves with the same shapes.

    Raises:
      ValueError: the two have different leaves, or a shape differs.
      TypeError: a mask is not boolean, or there is only one set of masks.

    Source: SAD, Zhou et al., ICLR 2021.

    >>> a = {"kernel": jnp.array([True, True, False, False])}
    >>> b = {"kernel": jnp.array([True, False, True, False])}
    >>> sad(a, b)["kernel"].item()
    2
    """
    masks_b = _second(masks_b)
    check_masks(masks_b, masks_b)
    check_masks(masks_a, masks_b)
    return {name: jnp.sum(mask != masks_b[name], dtype=jnp.int32) for name, mask in masks_a.items()}


def total_sad(masks_a: Masks, masks_b: Masks | None = None) -> Int32[Array, ""]:
    """SAD summed over all layers. Arguments and errors as in `sad`.

    An int32 holds up to 2**31 - 1 changes. If more are possible, sum the counts of `sad` as Python
    integers.
    """
    return jnp.sum(_stacked(sad(masks_a, _second(masks_b, "total_sad"))), dtype=jnp.int32)


def flip_rate(masks_a: Masks, masks_b: Masks | None = None) -> Float32[Array, ""]:
    """SAD between consecutive steps as a fraction of the weights, in [0, 1].

    Arguments and errors as in `sad`.

    Source: Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024.
    """
    return _fraction(sad(masks_a, _second(masks_b, "flip_rate")), masks_a)


def density(masks: Masks) -> dict[str, Float32[Array, ""]]:
    """Fraction of the weights that each layer keeps. Raises TypeError if a mask is not boolean."""
    check_masks(masks, masks)
    return {name: jnp.mean(mask, dtype=jnp.float32) for name, mask in masks.items()}


def total_density(masks: Masks) -> Float32[Array, ""]:
    """Fraction of all planned weights that is kept. Raises TypeError if a mask is not boolean."""
    check_masks(masks, masks)
    return _fraction({name: jnp.sum(mask, dtype=jnp.int32) for name, mask in masks.items()}, masks)


def blocks_per_row(masks: Masks, plan: Plan) -> dict[str, Int32[Array, "*_stack _rows"]]:
    """How many blocks each row of a layer keeps; a row is N consecutive output channels.

    A block counts if any of its weights is kept.

    Args:
      masks: leaf name -> boolean array, for at least every leaf with a `Block1xN` pattern.
      plan: says which leaves have blocks, and how they are cut.

    Returns:
      Leaf name -> counts, for the leaves with a `Block1xN` pattern.

    Raises:
      ValueError: a mask is missing, or masks do not have the planned shapes (the error lists all
        of them).
      TypeError: a mask is not boolean.

    >>> import nmjax
    >>> params = {"kernel": jnp.array([[3.0, 3.0, 0.0, 0.0], [1.0, 1.0, 2.0, 2.0]])}
    >>> plan = nmjax.make_plan(params, "1x2@0.5")
    >>> blocks_per_row(nmjax.compute_masks(params, plan), plan)["kernel"].tolist()
    [1, 1]
    """
    return {
        name: jnp.sum(kept, axis=-1, dtype=jnp.int32) for name, kept in _blocks(masks, plan).items()
    }


def row_balance(masks: Masks, plan: Plan) -> dict[str, RowBalance]:
    """The fewest and the most blocks that a row of each layer keeps.

    Arguments and errors as in `blocks_per_row`.
    """
    counts = blocks_per_row(masks, plan)
    return {name: RowBalance(jnp.min(count), jnp.max(count)) for name, count in counts.items()}


def blocks_regrown(before: Masks, after: Masks, plan: Plan) -> dict[str, Int32[Array, ""]]:
    """How many blocks of each layer are kept in `after` but were dropped in `before`.

    Arguments and errors as in `blocks_per_row`.
    """
    then, now = _blocks(before, plan), _blocks(after, plan)
    return {name: jnp.sum(now[name] & ~then[name], dtype=jnp.int32) for name in now}


def _second(masks: Masks | None, name: str = "sad") -> Masks:
    """The masks to compare with; raises TypeError, with the right call, if there are none."""
    if masks is None:
        raise TypeError(
            f"{name} compares two sets of masks: nmjax.{name}(nmjax.compute_masks(old_params, "
            "plan), nmjax.compute_masks(new_params, plan))"
        )
    return masks


def _blocks(masks: Masks, plan: Plan) -> dict[str, Bool[Array, "*_stack _rows _inputs"]]:
    """Which blocks are kept, for the leaves that have blocks."""
    check_plan(plan)
    check_are_masks(masks)
    patterns = {n: p for n, leaf in plan.items() if is_blocks(p := leaf.pattern)}
    missing = patterns.keys() - masks.keys()
    if missing:
        raise ValueError(f"masks are missing for the planned leaves {sorted(missing)}")
    given = {name: masks[name] for name in patterns}
    check_masks(given, given)
    misfits = [name for name in patterns if not fits(jnp.shape(masks[name]), plan[name])]
    if misfits:
        raise ValueError(
            "these masks do not fit the plan:\n"
            + "\n".join(
                f"  {name}: planned as {plan[name].shape}, got {jnp.shape(masks[name])}"
                for name in misfits
            )
        )
    return {
        name: jnp.any(split_blocks(jnp.asarray(masks[name]), pattern.n, plan[name].axes), axis=-1)
        for name, pattern in patterns.items()
    }


def _fraction(counts: Mapping[str, Int32[Array, ""]], masks: Masks) -> Float32[Array, ""]:
    """The sum of the counts as a fraction of all mask entries."""
    # Summed in float32: the total of a large model does not fit into an int32.
    entries = sum(mask.size for mask in masks.values())
    return jnp.sum(_stacked(counts), dtype=jnp.float32) / float(entries)


def _stacked(counts: Mapping[str, Int32[Array, ""]]) -> Int32[Array, " _leaves"]:
    if not counts:
        raise ValueError("there are no masks to measure; got an empty mapping")
    return jnp.stack(list(counts.values()))
