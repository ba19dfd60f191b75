"""MVUE of gradients: unbiased, of the least variance, as its formulas say."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax import methods

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
DRAWS = 40_000
GROUPS = {
    "even": [1.0, -1.5, 2.0, 0.5],
    "one above half": [8.0, -1.0, 2.0, 1.0],
    "two zeros": [0.0, 3.0, 0.0, -2.0],
    "one entry": [0.0, 0.0, 0.0, 5.0],
    "half": [-4.0, 1.0, 2.0, 1.0],
}


def successive_probabilities(x):
    """By the law of total probability, over all ordered pairs."""
    a = np.abs(x) + 1.19e-7
    p = np.zeros(4)
    for first, second in itertools.permutations(range(4), 2):
        both = a[first] / a.sum() * a[second] / (a.sum() - a[first])
        p[[first, second]] += both
    return p


def optimal_probabilities(x):
    """The least sum of x^2 / p, by bisection for c in p = min(1, c |x|)."""
    a = np.abs(x)
    low, high = 0.0, 2 / a[a > 0].min()
    for _ in range(100):
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(1, c * a).sum() < 2 else (low, c)
    return np.minimum(1, low * a)


EXPECTED = {"optimal": optimal_probabilities, "successive": successive_probabilities}


@pytest.mark.parametrize("draw", EXPECTED)
@pytest.mark.parametrize("name", GROUPS)
def test_mean_and_variance_are_those_of_the_formula(name, draw):
    x = np.array(GROUPS[name])
    many = jnp.asarray(np.tile(x, DRAWS), jnp.float32)
    drawn = np.asarray(methods.mvue_24(many, KEY, 0, draw=draw)).reshape(DRAWS, 4)
    assert (np.count_nonzero(drawn, axis=1) <= 2).all()
    p = EXPECTED[draw](x)
    worth = x / np.where(x == 0, 1, p)
    np.testing.assert_allclose(np.where(drawn != 0, drawn, worth), worth + 0 * drawn, rtol=1e-4)
    variance = worth * x - x**2
    assert (np.abs(drawn.mean(axis=0) - x) <= 5 * np.sqrt(variance.clip(0) / DRAWS) + 1e-5).all()
    np.testing.assert_allclose(drawn.var(axis=0), variance, rtol=0.05, atol=1e-4)


def test_the_optimal_draw_varies_least():
    """Against other probabilities that add up to 2, at random and near the optimum."""
    x = RNG.normal(size=4)
    best = np.sum(x**2 / optimal_probabilities(x))
    others = RNG.dirichlet(np.ones(4), 10_000) * 2
    others = np.concatenate([others, optimal_probabilities(x) + 0.01 * (others - 0.5)])
    others = others / others.sum(axis=1, keepdims=True) * 2
    others = others[(others <= 1).all(axis=1) & (others > 0).all(axis=1)]
    assert len(others) > 1000
    assert best <= np.sum(x**2 / others, axis=1).min()
    assert best <= np.sum(x**2 / successive_probabilities(x))


@pytest.mark.parametrize("axis", [0, -2])
def test_groups_run_along_the_axis(axis):
    x = jnp.asarray(RNG.normal(size=(4, 8, 12)), jnp.bfloat16)
    drawn = methods.mvue_24(x, KEY, axis)
    assert drawn.dtype == x.dtype
    groups = np.moveaxis(np.asarray(drawn, np.float32), axis, -1).reshape(-1, 4)
    assert (np.count_nonzero(groups, axis=1) == 2).all()


@pytest.mark.not_under("jax_debug_nans")
def test_groups_that_are_not_finite_stay_visible():
    x = jnp.array([1.0, jnp.nan, 2.0, 3.0, 1.0, jnp.inf, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    expected = [0, np.nan, 0, 3, 0, np.inf, 0, 3, 0, 0, 0, 0]
    np.testing.assert_array_equal(methods.mvue_24(x, KEY, 0), expected)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"do not fit axis -2 of shape \(6, 4\)"):
        methods.mvue_24(jnp.ones((6, 4)), KEY)
    with pytest.raises(TypeError, match="gradients"):
        methods.mvue_24(jnp.ones((4, 4), int), KEY)
    with pytest.raises(ValueError, match="draw must be"):
        methods.mvue_24(jnp.ones((4, 4)), KEY, draw="best")
    with pytest.raises(ValueError, match=r"multiple of 4 tokens, x \(6, 4\) has 6"):
        methods.training_matmul(jnp.ones((6, 4)), jnp.ones((4, 2)), key=KEY)
    with pytest.raises(ValueError, match=r"backward \(4, 3\) should be"):
        methods.training_matmul(jnp.ones((6, 4)), jnp.ones((4, 2)), backward=jnp.ones((4, 3)))


@pytest.mark.parametrize("with_key", [False, True])
def test_the_product_uses_each_weight_in_its_direction(with_key):
    x, w, b, g = (RNG.normal(size=shape) for shape in [(2, 4, 6), (6, 8), (6, 8), (2, 4, 8)])
    key = KEY if with_key else None
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, w, b)]

    def multiply(x, w, b):
        return methods.training_matmul(x, w, backward=b, key=key)

    y, pull_back = jax.vjp(multiply, *arrays)
    dx, dw, db = jax.jit(pull_back)(jnp.asarray(g, jnp.float32))
    rows = g.reshape(8, 8)
    drawn = np.asarray(methods.mvue_24(jnp.asarray(rows), KEY)) if with_key else rows
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, g @ b.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dw, x.reshape(8, 6).T @ drawn, rtol=1e-4, atol=1e-5)
    assert not np.asarray(db).any()
