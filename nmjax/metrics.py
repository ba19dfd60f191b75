"""How a topology changes, and how much of a network is left.

Everything here that is an array may be computed inside `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from nmjax.sparsify import Masks, check_masks


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
    """Fraction of the weights kept in each layer: leaf name -> float32 scalar."""
    return {name: jnp.mean(mask, dtype=jnp.float32) for name, mask in masks.items()}


def total_density(masks: Masks) -> jax.Array:
    """Fraction of all planned weights that is kept, a float32 scalar."""
    return _share({name: jnp.sum(mask, dtype=jnp.int32) for name, mask in masks.items()}, masks)


def _share(counts: Mapping[str, jax.Array], masks: Masks) -> jax.Array:
    """The counts' sum as a fraction of all entries, summed in float32: int32 ends at 2**31."""
    entries = sum(mask.size for mask in masks.values())
    return jnp.sum(jnp.stack(list(counts.values())), dtype=jnp.float32) / float(entries)
