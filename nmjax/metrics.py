"""How a topology changes, and how much of a network is left.

Everything here that is an array may be computed inside `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nmjax.masks.blocks import split_blocks
from nmjax.patterns import Block1xN
from nmjax.plans import Plan
from nmjax.pruning import Masks, check_masks, fits


class RowBalance(NamedTuple):
    """How many blocks the rows of one layer keep; equal where threads get equal work.

    Attributes:
      fewest: int32 scalar, blocks in the row that keeps fewest.
      most: int32 scalar, blocks in the row that keeps most.
    """

    fewest: jax.Array
    most: jax.Array


def sad(masks_a: Masks, masks_b: Masks) -> dict[str, jax.Array]:
    """Sparse Architecture Divergence of each layer: how many mask entries differ.

    Two moments of one training run, or two runs, may be compared. One swap inside a group changes
    two entries, and both are counted.

    Args:
      masks_a: leaf name -> boolean array, as from `nmjax.compute_masks`.
      masks_b: the same leaves with the same shapes.

    Returns:
      Leaf name -> int32 scalar.

    Raises:
      ValueError: the two name different leaves, or a shape differs.
      TypeError: a mask is not boolean.

    Source: SAD, Zhou et al., ICLR 2021.

    >>> a = {"kernel": jnp.array([True, True, False, False])}
    >>> b = {"kernel": jnp.array([True, False, True, False])}
    >>> sad(a, b)["kernel"].item()
    2
    """
    check_masks(masks_a, masks_b)
    check_masks(masks_b, masks_a)
    return {name: jnp.sum(mask != masks_b[name], dtype=jnp.int32) for name, mask in masks_a.items()}


def total_sad(masks_a: Masks, masks_b: Masks) -> jax.Array:
    """SAD summed over the layers, an int32 scalar. Arguments and errors as `sad`.

    An int32 holds up to 2**31 - 1 changes. Where more are possible, add the counts of `sad` up as
    Python integers.
    """
    return jnp.sum(jnp.stack(list(sad(masks_a, masks_b).values())), dtype=jnp.int32)


def flip_rate(masks_a: Masks, masks_b: Masks) -> jax.Array:
    """SAD between consecutive steps as a fraction of the weights, a float32 scalar in [0, 1].

    Source: Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024.
    Arguments and errors as `sad`.
    """
    return _share(sad(masks_a, masks_b), masks_a)


def density(masks: Masks) -> dict[str, jax.Array]:
    """Fraction of the weights kept in each layer: leaf name -> float32 scalar.

    Raises:
      TypeError: a mask is not boolean.
    """
    check_masks(masks, masks)
    return {name: jnp.mean(mask, dtype=jnp.float32) for name, mask in masks.items()}


def total_density(masks: Masks) -> jax.Array:
    """Fraction of all planned weights that is kept, a float32 scalar. Errors as `density`."""
    check_masks(masks, masks)
    return _share({name: jnp.sum(mask, dtype=jnp.int32) for name, mask in masks.items()}, masks)


def blocks_per_row(masks: Masks, plan: Plan) -> dict[str, jax.Array]:
    """How many blocks each row of a layer keeps, a row being N consecutive output channels.

    Args:
      masks: leaf name -> boolean array, for every leaf with blocks.
      plan: says which leaves those are, and how they are cut.

    Returns:
      Leaf name -> int32 array (*stack, rows), for the leaves with a `Block1xN` pattern. A block
      counts if any weight of it is kept.

    Raises:
      ValueError: a mask is missing, or of another shape than planned (all such are named).
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
    """The fewest and the most blocks that a row of a layer keeps.

    Arguments and errors as `blocks_per_row`.
    """
    counts = blocks_per_row(masks, plan)
    return {name: RowBalance(jnp.min(count), jnp.max(count)) for name, count in counts.items()}


def blocks_regrown(before: Masks, after: Masks, plan: Plan) -> dict[str, jax.Array]:
    """How many blocks of each layer are kept after that were dropped before, int32 scalars.

    Arguments and errors as `blocks_per_row`.
    """
    then, now = _blocks(before, plan), _blocks(after, plan)
    return {name: jnp.sum(now[name] & ~then[name], dtype=jnp.int32) for name in now}


def _blocks(masks: Masks, plan: Plan) -> dict[str, jax.Array]:
    """Which blocks are kept, (*stack, rows, inputs), by name of the leaves that have blocks."""
    patterns = {n: p for n, leaf in plan.items() if isinstance(p := leaf.pattern, Block1xN)}
    missing = patterns.keys() - masks.keys()
    if missing:
        raise ValueError(f"there are no masks of the planned leaves {sorted(missing)}")
    misfits = [name for name in patterns if not fits(jnp.shape(masks[name]), plan[name])]
    if misfits:
        raise ValueError(
            "these masks do not fit the plan:\n"
            + "\n".join(
                f"  {name}: planned as {plan[name].shape}, got {jnp.shape(masks[name])}"
                for name in misfits
            )
        )
    given = {name: masks[name] for name in patterns}
    check_masks(given, given)
    return {
        name: jnp.any(split_blocks(jnp.asarray(masks[name]), pattern.n, plan[name].axes), axis=-1)
        for name, pattern in patterns.items()
    }


def _share(counts: Mapping[str, jax.Array], masks: Masks) -> jax.Array:
    """The counts' sum as a fraction of all entries, summed in float32: int32 ends at 2**31."""
    entries = sum(mask.size for mask in masks.values())
    return jnp.sum(jnp.stack(list(counts.values())), dtype=jnp.float32) / float(entries)
