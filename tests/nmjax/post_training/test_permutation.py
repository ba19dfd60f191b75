"""Orders of the inputs that keep more under an N:M pattern."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmjax
from nmjax.post_training import permute_inputs


def kept(w, n, m):
    """The sum of the magnitudes that n:m keeps, by a sort."""
    groups = np.sort(np.abs(np.asarray(w, np.float64)).reshape(-1, m, w.shape[1]), axis=1)
    return groups[:, m - n :].sum()


@pytest.fixture(scope="module")
def published():
    """The matrix of ASP's published example, as (in, out)."""
    return np.random.RandomState(1).rand(128, 64).T


@pytest.mark.parametrize(
    ("window", "at_least"),
    [(None, 2913.351), (8, 2919.75), pytest.param(12, 2921.9, marks=pytest.mark.slow)],
)
def test_it_keeps_what_asp_publishes(published, window, at_least):
    assert published.sum() == pytest.approx(4083.169, abs=1e-3)
    assert kept(published, 2, 4) == pytest.approx(2852.377, abs=1e-3)
    found = kept(published[permute_inputs(published, "2:4", window)], 2, 4)
    assert found >= at_least
    if window is None:  # Their greedy search, which ours equals swap for swap.
        assert found == pytest.approx(2913.351, abs=1e-3)


@given(
    st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (2, 3), (4, 8), (4, 4)]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_an_order_holds_every_input_and_never_keeps_less(pattern, groups, outputs, ties, seed):
    n, m = pattern
    w = np.random.RandomState(seed).randn(groups * m, outputs)
    w = np.round(w) if ties else w
    order = permute_inputs(w, nmjax.NM(n, m))
    assert sorted(order.tolist()) == list(range(len(w)))
    assert kept(w[order], n, m) >= kept(w, n, m)
    # No swap of two inputs is left that gains.
    for i, j in itertools.combinations(range(len(w)), 2):
        swapped = np.array(order)
        swapped[[i, j]] = swapped[[j, i]]
        assert kept(w[swapped], n, m) <= kept(w[order], n, m) + 1e-6


@pytest.mark.parametrize(("n", "m", "window"), [(2, 4, 8), (1, 2, 6), (1, 3, 6)])
def test_a_window_over_all_inputs_finds_the_best_order(n, m, window):
    w = np.random.RandomState(n).randn(window, 3)
    found = kept(w[permute_inputs(w, f"{n}:{m}", window)], n, m)
    orders = map(list, itertools.permutations(range(window)))
    assert found == pytest.approx(max(kept(w[order], n, m) for order in orders))


def test_a_score_decides_what_is_kept():
    w = jnp.array(np.random.RandomState(0).randn(16, 8), jnp.bfloat16)
    scales = jnp.exp(jnp.array(np.random.RandomState(1).randn(16, 1)))
    order = permute_inputs(w, "2:4", score=lambda w: jnp.abs(w).astype(scales.dtype) * scales)
    assert (order == permute_inputs(w.astype(scales.dtype) * scales, "2:4")).all()


@pytest.mark.parametrize(
    ("shape", "pattern", "window", "message"),
    [
        ((8, 2), "1x2@0.5", None, "makes no difference to 1x2@0.5"),
        ((16, 2), "2:4/2", None, "permute_inputs takes groups of consecutive weights"),
        ((2, 8, 2), "2:4", None, r"must be a matrix \(in, out\), got shape \(2, 8, 2\)"),
        ((6, 2), "2:4", None, "6 inputs, of weights of shape .* are not a multiple of 4"),
        ((16, 2), "2:4", 10, "two or more whole groups of 4 inputs, such as 8; got 10"),
        ((16, 2), "2:4", 4, "two or more whole groups of 4 inputs"),
        ((64, 2), "2:16", 32, "takes too long"),
        ((16, 2), "2:4", 32, "window=32 holds more inputs than the 16"),
    ],
)
def test_what_cannot_be_permuted_is_an_error(shape, pattern, window, message):
    with pytest.raises(ValueError, match=message):
        permute_inputs(jnp.ones(shape), pattern, window)


@pytest.mark.not_under("jax_debug_nans")
def test_scores_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="must be finite"):
        permute_inputs(jnp.full((8, 2), jnp.nan), "2:4")
    with pytest.raises(TypeError, match="window must be an integer or None, got '8'"):
        permute_inputs(jnp.ones((8, 2)), "2:4", "8")
