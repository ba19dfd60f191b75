"""Statistics of paired comparisons, against SciPy's tests, simulation and the definition."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.ladder.statistics import compare_all, detectable, holm, paired

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("seeds", [2, 3, 6, 20])
def test_a_difference_equals_scipys_paired_test(seeds):
    values, others = RNG.normal(0.3, 1, seeds), RNG.normal(0, 1, seeds)
    found, expected = paired(values, others), stats.ttest_rel(values, others)
    interval = expected.confidence_interval(0.95)
    assert found.seeds == seeds
    np.testing.assert_allclose(
        [found.mean, found.p, found.low, found.high],
        [np.mean(values - others), expected.pvalue, interval.low, interval.high],
        rtol=1e-9,
    )


def test_a_difference_by_hand():
    """Differences 1, 2, 3: mean 2, error 1 / sqrt(3), t(0.975, 2) = 4.302653."""
    found = paired([2, 4, 6], [1, 2, 3])
    assert found.mean == 2
    assert found.high - 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_equal_differences_are_clear_unless_they_are_zero():
    assert paired([1.5, 2.5], [1, 2])[1:5] == (0.5, 0.5, 0.5, 0.0)
    assert paired([1, 2], [1, 2])[1:5] == (0, 0, 0, 1.0)


def closed_testing(p):
    """Holm as a closed test: the largest Bonferroni p-value of all families that hold a test."""
    tests = range(len(p))
    families = [f for size in tests for f in itertools.combinations(tests, size + 1)]
    return [max(min(1, len(f) * min(p[j] for j in f)) for f in families if i in f) for i in tests]


@given(st.lists(st.sampled_from([0, 0.001, 0.01, 0.02, 0.04, 0.3, 1.0]), min_size=1, max_size=6))
def test_holm_equals_the_closed_test(p):
    np.testing.assert_allclose(holm(p), closed_testing(p), rtol=1e-12)


def test_holm_of_a_published_kind_of_table():
    """By hand: 4 * 0.005, then 3 * 0.01, then 2 * 0.03; the last may not fall below it."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([]).shape == (0,)


@pytest.mark.parametrize("seeds", [2, 4, 6])
def test_the_detectable_effect_is_seen_in_four_of_five_trials(seeds):
    shift = detectable(1 / np.sqrt(seeds), seeds)
    draws = np.random.default_rng(1).normal(shift, 1, (40_000, seeds))
    p = stats.ttest_1samp(draws, 0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.01)


def test_noise_rarely_raises_an_alarm_in_a_family():
    """Six methods that equal the reference: at least one looks different in at most 5%."""
    rng, alarms = np.random.default_rng(2), 0
    for _ in range(400):
        names = ["sr_ste", *"abcdef"]
        found = compare_all({name: rng.normal(size=6) for name in names}, "sr_ste")
        alarms += any(compared.is_clear for compared in found.values())
    # 20 are expected at most; 34 would be three standard deviations more.
    assert alarms < 34


def test_all_are_compared_with_the_reference_and_corrected_together():
    results = {"sr_ste": [0.0, 0, 0, 0], "a": [1, 1.1, 0.9, 1], "b": [0.1, -0.1, 0.2, -0.1]}
    found = compare_all(results, "sr_ste")
    assert list(found) == ["a", "b"]
    assert found["a"].corrected == pytest.approx(2 * found["a"].difference.p)
    assert found["b"].corrected == pytest.approx(found["b"].difference.p)
    assert (found["a"].is_clear, found["b"].is_clear) == (True, False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired([1], [2]), "1 and 1 results"),
        (lambda: paired([1, 2], [2, 3, 4]), "2 and 3 results"),
        (lambda: paired([1, float("nan")], [2, 3]), "must be finite"),
        (lambda: holm([0.5, 1.5]), "between 0 and 1"),
        (lambda: compare_all({"ste": [1, 2]}, "sr_ste"), "no results of 'sr_ste'; there are ste"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
