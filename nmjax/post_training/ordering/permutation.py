"""Orders the inputs of a weight so that an N:M pattern keeps more of it.

Which weights share a group depends on the order of the inputs. Where the program lets them be
reordered for free, as the hidden channels of an MLP, a better order costs nothing at run time. The
search runs on the host, with NumPy: its steps depend on the values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from nmjax.masks.arguments import is_integer
from nmjax.masks.ranking import check_real_floating
from nmjax.masks.scores import Score, as_array, magnitude, score_weights
from nmjax.patterns.nm import NM
from nmjax.patterns.pattern import Pattern, parse_pattern

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int32

# A gain counts from this fraction of the sum of all scores on; below is rounding.
_SMALLEST_GAIN = 1e-8
# The most ways to split a window, and the most windows, that the search tries: minutes on one core.
_MOST_SPLITS = 10_000
_MOST_WINDOWS = 100_000


def permute_inputs(
    w: Float[ArrayLike, "inputs outputs"],
    pattern: str | Pattern,
    window: int | None = None,
    *,
    score: Score = magnitude,
) -> Int32[Array, " inputs"]:
    """Finds an order of the inputs under which an N:M pattern keeps a higher total score.

    By default it swaps pairs of inputs in different groups: all pairs are ranked by what their swap
    gains, the best ones that share no group are carried out, and so on until none gains. With a
    window it looks at every choice of `window / m` groups, finds the best way to deal their inputs
    out to the groups again, and applies the best windows that share no group. Larger windows find
    better orders and take longer. Both end in a local optimum, and both are deterministic.

    The time of a round grows with inputs^2 outputs for pairs, and with inputs^(window / m) outputs
    for windows.

    Args:
      w: (in, out) matrix, real floating dtype. Groups run along its first axis. For matrices that
        must share an order, concatenate them along the outputs.
      pattern: `"N:M"` or `nmjax.NM`; m divides the inputs.
      window: inputs that are dealt out together, a multiple of m: 8 or 12 for 2:4. None swaps
        pairs.
      score: importance of each weight; of calibrated scores pass a function that returns them.

    Returns:
      int32 (in,), the inputs in their new order: `w[order]` keeps more than `w`. Pass it to
      `nmjax.permute_channels` together with everything else that runs along these channels.

    Raises:
      TypeError: `w` is not a floating-point array; `window` is not an integer.
      ValueError: `w` is not a matrix, or its scores are not finite; the pattern is not N:M of
        consecutive weights, or m does not divide the inputs; the window does not hold two groups or
        more, or holds too many to try.

    >>> w = jnp.array([[5.0], [4.0], [3.0], [2.0], [1.0], [1.0], [1.0], [1.0]])
    >>> w[permute_inputs(w, "2:4")].ravel().tolist()  # All of 5, 4, 3 and 2 can stay.
    [1.0, 1.0, 3.0, 2.0, 5.0, 4.0, 1.0, 1.0]

    Source: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021; ASP of NVIDIA's
    Apex. Ours takes any n and m, measures the smallest gain relative to the sum of the scores, and
    makes no random escapes from a local optimum.
    """
    n, m = _group_of(pattern)
    scores = _finite_scores(w, m, score)
    smallest = _SMALLEST_GAIN * float(np.abs(scores).sum())
    if window is None:
        order = _swap_pairs(scores, n, m, smallest)
    else:
        _check_window(window, len(scores), m)
        order = _deal_windows(scores, n, m, window, smallest)
    return jnp.asarray(order, jnp.int32)


def _swap_pairs(scores: np.ndarray, n: int, m: int, smallest: float) -> np.ndarray:
    """The order after swaps of two inputs, until no swap gains."""
    count, groups = len(scores), len(scores) // m
    order = np.arange(count)
    # met[i, j]: what the group of place i keeps if the input at place j moves there.
    met, fixed, bar = np.empty((count, count)), np.empty(count), np.empty_like(scores)
    changed, moved = np.arange(groups), order.copy()
    while n < m and len(moved):
        x = scores[order]
        places = _places(changed, m)
        fixed[places], bar[places] = _without_each(x[places].reshape(-1, m, x.shape[1]), n)
        for i in places:
            met[i] = fixed[i] + np.maximum(bar[i], x).sum(1)
        for j in moved:
            met[:, j] = fixed + np.maximum(bar, x[j]).sum(1)
        alone = np.diagonal(met)
        gain = met + met.T - alone - alone[:, None]
        by_group = gain.reshape(groups, m, groups, m).swapaxes(1, 2).reshape(groups, groups, -1)
        a, b = np.triu_indices(groups, 1)
        chosen = _apart(np.stack([a, b], 1), by_group.max(2)[a, b], smallest)
        best = by_group.argmax(2)[a[chosen], b[chosen]]
        first, second = a[chosen] * m + best // m, b[chosen] * m + best % m
        order[first], order[second] = order[second], order[first]
        changed, moved = np.union1d(a[chosen], b[chosen]), np.union1d(first, second)
    return order


def _without_each(groups: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """What each group (groups, m, outputs) keeps for certain if one member is replaced.

    Returns:
      The sum of the n - 1 highest scores of the other members, over all outputs; and for each
      output the n-th, which a new member has to beat.
    """
    members = range(groups.shape[1])
    others = -np.sort(-np.stack([np.delete(groups, i, 1) for i in members], 1), 2)
    return others[:, :, : n - 1].sum((2, 3)).ravel(), others[:, :, n - 1].reshape(
        -1, groups.shape[2]
    )


def _deal_windows(scores: np.ndarray, n: int, m: int, window: int, smallest: float) -> np.ndarray:
    """The order after dealing out the inputs of windows, until no window gains."""
    order = np.arange(len(scores))
    subsets, splits = _splits(window, m)
    windows = np.array(list(itertools.combinations(range(len(scores) // m), window // m)))
    gain, best = np.zeros(len(windows)), np.zeros(len(windows), int)
    stale = np.arange(len(windows))
    while n < m and len(stale):
        for i in stale:
            x = scores[order[_places(windows[i], m)]]
            kept = _sum_of_highest([x[members] for members in subsets.T], n)[splits].sum(1)
            best[i] = kept.argmax()
            gain[i] = kept[best[i]] - kept[0]  # The first split is the order as it is.
        chosen = _apart(windows, gain, smallest)
        for i in chosen:
            places = _places(windows[i], m)
            order[places] = order[places[subsets[splits[best[i]]].ravel()]]
        stale = np.flatnonzero(np.isin(windows, windows[chosen]).any(1))
    return order


def _sum_of_highest(members: list[np.ndarray], n: int) -> np.ndarray:
    """The n highest of the members at each place, summed over the last axis."""
    # A few passes of bubble sort over whole arrays: NumPy sorts short rows many times slower.
    total = np.zeros(members[0].shape[0])
    for _ in range(n):
        highest, *rest = members
        members = []
        for other in rest:
            members.append(np.minimum(highest, other))
            highest = np.maximum(highest, other)
        total += highest.sum(-1)
    return total


def _apart(groups: np.ndarray, gain: np.ndarray, smallest: float) -> np.ndarray:
    """The candidates (rows of groups) with the highest gains that share no group."""
    candidates = np.flatnonzero(gain > smallest)
    used: set[int] = set()
    chosen = []
    for i in candidates[np.argsort(-gain[candidates], kind="stable")]:
        if used.isdisjoint(mine := groups[i].tolist()):
            used.update(mine)
            chosen.append(i)
    return np.array(chosen, int)


def _splits(window: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The subsets of m out of a window, and the ways to split it, as numbers of subsets."""
    subsets = list(itertools.combinations(range(window), m))
    number = {subset: i for i, subset in enumerate(subsets)}

    def split(rest: tuple[int, ...]) -> Iterator[list[int]]:
        if not rest:
            yield []
        # The first input left over starts a group, so that each split appears once.
        for others in itertools.combinations(rest[1:], m - 1) if rest else ():
            taken = (rest[0], *others)
            for tail in split(tuple(i for i in rest if i not in taken)):
                yield [number[taken], *tail]

    return np.array(subsets), np.array(list(split(tuple(range(window)))))


def _places(groups: np.ndarray, m: int) -> np.ndarray:
    return (groups[:, None] * m + np.arange(m)).ravel()


def _group_of(pattern: str | Pattern) -> tuple[int, int]:
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NM):
        raise ValueError(
            f"the order of the inputs makes no difference to {parsed}, whose blocks may be at any "
            "inputs; nmjax.sort_channels reorders outputs for such patterns"
        )
    parsed.check_consecutive("permute_inputs")
    return parsed.n, parsed.m


def _finite_scores(w: ArrayLike, m: int, score: Score) -> np.ndarray:
    w = as_array(w)
    check_real_floating("weights", w.dtype)
    if w.ndim != 2:
        raise ValueError(
            f"weights must be a matrix (in, out), got shape {w.shape}; merge the axes of other "
            "layouts first"
        )
    if w.shape[0] % m:
        raise ValueError(
            f"{w.shape[0]} inputs, of weights of shape {w.shape}, are not a multiple of {m}; "
            "choose another m"
        )
    scores = np.asarray(score_weights(w, score), np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite, but some are NaN or infinite")
    return scores


def _check_window(window: int, inputs: int, m: int) -> None:
    if isinstance(window, bool) or not is_integer(window):
        raise TypeError(f"window must be an integer or None, got {window!r}")
    size = window // m
    if window % m or size < 2:
        raise ValueError(
            f"a window holds two or more whole groups of {m} inputs, such as {2 * m}; got {window}"
        )
    if window > inputs:
        raise ValueError(f"window={window} holds more inputs than the {inputs} that there are")
    splits = math.factorial(window) // (math.factorial(m) ** size * math.factorial(size))
    windows = math.comb(inputs // m, size)
    if splits > _MOST_SPLITS or windows > _MOST_WINDOWS:
        raise ValueError(
            f"window={window} takes too long: {windows:,} windows of {inputs} inputs, each with "
            f"{splits:,} ways to deal them out; take a smaller window, or None to swap pairs"
        )
