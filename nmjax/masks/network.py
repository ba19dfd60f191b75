"""Which members of a group are kept, worked out across arrays with one member of every group each.

Plain comparisons, minima, and maxima between whole arrays: XLA fuses them into one pass, and a
kernel can run them on registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int, Num


def kept_members(keys: Sequence[Int[Array, "*shape"]], n: int) -> list[Bool[Array, "*shape"]]:
    """Keeps the n highest keys of each group; in a tie, the first.

    Args:
      keys: integers that sort like the scores, one array per member of a group.
      n: how many members of each group are kept.
    """
    # Comparing every pair pays for few members only.
    return kept_by_comparison(keys, n) if len(keys) <= 4 else list(kept_by_network(keys, n))


def kept_of_distinct(keys: Sequence[Num[Array, "*shape"]], n: int) -> list[Bool[Array, "*shape"]]:
    """Keeps the n highest keys of each group, no two of which are equal."""
    threshold = nth_highest(keys, n)
    return [key >= threshold for key in keys]


def kept_by_comparison(keys: Sequence[Int[Array, "*shape"]], n: int) -> list[Bool[Array, "*shape"]]:
    """Keeps what fewer than n members beat, as `kept_members` does."""
    beaten_by = [jnp.zeros_like(key) for key in keys]
    for j in range(len(keys)):
        for i in range(j):
            first_wins = (keys[i] >= keys[j]).astype(keys[i].dtype)
            beaten_by[j] += first_wins
            beaten_by[i] += 1 - first_wins
    return [count < n for count in beaten_by]


def kept_by_network(
    keys: Sequence[Int[Array, "*shape"]], n: int
) -> Iterator[Bool[Array, "*shape"]]:
    """Keeps what a sorting network ranks among the first n, as `kept_members` does."""
    threshold = nth_highest(keys, n)
    # Keys above the threshold all stay. The places that are left go to the keys equal to it, the
    # lowest index first.
    ties_left = n - sum((key > threshold).astype(jnp.int32) for key in keys)
    for key in keys:
        tied = key == threshold
        yield (key > threshold) | (tied & (ties_left > 0))
        ties_left -= tied.astype(jnp.int32)


def nth_highest(keys: Sequence[Num[Array, "*shape"]], n: int) -> Num[Array, "*shape"]:
    """The n-th highest key of each group, by a sorting network."""
    return _sorted_descending(keys)[n - 1]


def _sorted_descending(values: Sequence[Num[Array, "*shape"]]) -> list[Num[Array, "*shape"]]:
    """Sorts elementwise across arrays. XLA never computes the outputs that nobody reads."""
    # A network compares fixed pairs of positions, so "sorting" is a chain of elementwise minima and
    # maxima. XLA fuses it, which it cannot do with a sort.
    wires = list(values)
    for i, j in _merge_exchange(len(wires)):
        wires[i], wires[j] = jnp.maximum(wires[i], wires[j]), jnp.minimum(wires[i], wires[j])
    return wires


def _merge_exchange(size: int) -> Iterator[tuple[int, int]]:
    """Comparator pairs of Batcher's merge exchange (Knuth, TAOCP 3, 5.2.2, algorithm M)."""
    top = 1 << max(size - 1, 0).bit_length() >> 1
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            yield from ((i, i + d) for i in range(size - d) if i & p == r)
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
