"""Statistics of a comparison of methods: paired differences over seeds, corrected for their number.

Two methods trained with one seed share its weights and batches, so their results are compared seed
by seed. A family holds the comparisons that one conclusion is drawn from, such as all methods
with SR-STE at one pattern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

CONFIDENCE = 0.95
POWER = 0.8  # The chance with which a test shall see the effect that `detectable` returns.


class Difference(NamedTuple):
    """How much a method's results lie above those of another, over paired seeds.

    Attributes:
      seeds: number of pairs.
      mean: of the differences.
      low: lower end of the confidence interval of the mean.
      high: its upper end.
      p: of the two-sided t-test that the mean is 0, before any correction.
      detectable: the smallest true mean that such a test sees with a chance of 80%, if the
        differences vary as much as they did here.
    """

    seeds: int
    mean: float
    low: float
    high: float
    p: float
    detectable: float


class Compared(NamedTuple):
    """A difference, and its p-value after Holm's correction for the family's size."""

    difference: Difference
    corrected: float

    @property
    def is_clear(self) -> bool:
        """Whether the methods differ, at 95% for the family as a whole."""
        return self.corrected < 1 - CONFIDENCE


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """The difference `values - others`, seed by seed.

        mean +- t(0.975, n - 1) * sd / sqrt(n)

    Args:
      values: one result for each seed.
      others: the other method's results for the same seeds, in the same order.

    Raises:
      ValueError: the lengths differ, there are fewer than two seeds, or a result is not finite.

    Source: Student, "The probable error of a mean", Biometrika 1908.
    """
    if len(values) != len(others) or len(values) < 2:
        raise ValueError(
            f"{len(values)} and {len(others)} results: both need the same seeds, at least two"
        )
    differences = np.asarray(values, float) - np.asarray(others, float)
    if not np.isfinite(differences).all():
        raise ValueError(f"results must be finite; the differences are {differences.tolist()}")
    seeds, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / np.sqrt(seeds)
    reach = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1))
    return Difference(
        seeds,
        mean,
        mean - reach,
        mean + reach,
        _p_value(mean, error, seeds),
        detectable(error, seeds),
    )


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's corrected p-values: the family's chance of any false alarm stays below the level.

        corrected[i] = max over p[j] <= p[i] of min((m - rank[j]) * p[j], 1), ranks from 0

    Args:
      p_values: `m` p-values of one family, each in [0, 1].

    Raises:
      ValueError: one is outside of [0, 1].

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    p = np.asarray(p_values, float).reshape(-1)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values lie between 0 and 1, got {p.tolist()}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def compare_all(results: Mapping[str, Sequence[float]], reference: str) -> dict[str, Compared]:
    """Compares every method with the reference; these comparisons are one family.

    Args:
      results: method -> one result for each seed, in the same order of seeds.
      reference: the method that all others are compared with.

    Raises:
      ValueError: the reference is missing, or `paired` refuses a method's results.
    """
    if reference not in results:
        raise ValueError(f"no results of {reference!r}; there are {', '.join(results) or 'none'}")
    found = {
        method: paired(values, results[reference])
        for method, values in results.items()
        if method != reference
    }
    corrected = holm([difference.p for difference in found.values()])
    return {
        method: Compared(difference, float(p))
        for (method, difference), p in zip(found.items(), corrected, strict=True)
    }


def detectable(error: float, seeds: int) -> float:
    """The smallest true mean that a two-sided t-test sees with a chance of 80%.

    Args:
      error: standard error of the mean.
      seeds: number of pairs, at least two.

    Source: Student's t is `(z + shift) / s`, where z is normal and `(n - 1) s ** 2` chi-square. So
    `P(t > c)` is the mean of `Phi(shift - c s)` over s.
    """
    freedom = seeds - 1
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    # Quantiles of s at the middles of equal shares. SciPy's noncentral t returns NaN for few seeds.
    shares = (np.arange(4096) + 0.5) / 4096
    spread = np.sqrt(stats.chi2.ppf(shares, freedom) / freedom)

    def missing(shift: float) -> float:
        above, below = (special.ndtr(side * shift - critical * spread) for side in (1, -1))
        return float(np.mean(above + below)) - POWER

    # At a shift of 0 the chance is 5%; at four critical values it exceeds 80% for all seeds.
    return error * float(optimize.brentq(missing, 0.0, 4 * critical))


def _p_value(mean: float, error: float, seeds: int) -> float:
    if error == 0:
        # All seeds differ by the same amount: no spread speaks against it.
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, seeds - 1))
