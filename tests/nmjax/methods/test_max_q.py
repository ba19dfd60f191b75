"""MaxQ, its ramp alone and its soft mask alone, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax
from nmjax import methods
from tests.nmjax.methods.replay import W, gradient, keep, plan_of, replay, sgd, train

END = 14


def query(w, n, m, axes, tau):
    """A filter, or a tap, at a time: sorted, cut, sigmoid of the distance to the cut."""
    moved = np.moveaxis(np.abs(w), axes, range(-len(axes), 0))
    flat = moved.reshape(-1, np.prod(moved.shape[-len(axes) :]))
    at = flat.shape[-1] - flat.shape[-1] * n // m
    ascending = np.sort(flat, axis=-1)
    threshold = ascending[:, at - 1 : at + 1].mean(axis=-1, keepdims=True)
    soft = np.where(flat > threshold, 1 / (1 + np.exp(-(flat - threshold) / tau)), 0)
    return np.moveaxis(soft.reshape(moved.shape), range(-len(axes), 0), axes)


def dense_groups(w, m, share, order):
    sizes = np.abs(w).reshape(-1, m, w.shape[-1]).sum(axis=1)
    count = int(sizes.size * share + 1e-9)
    chosen = np.zeros(sizes.size, bool)
    chosen[np.argsort(order * sizes.T.ravel(), kind="stable")[:count]] = True
    return np.repeat(chosen.reshape(sizes.T.shape).T, m, axis=0)


def left(t):
    return max(0, 1 - t / END)


CASES = {
    "published": ({"lambda_w": 0.05}, 1),
    "ramp alone": ({"soft": False}, 1),
    "reversed": ({"soft": False, "dense_longest": "largest"}, -1),
}


@pytest.mark.parametrize(
    "case",
    [
        "published",
        pytest.param("ramp alone", marks=pytest.mark.slow),
        pytest.param("reversed", marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_the_formula(case):
    given, order = CASES[case]
    n, m, tau = 1, 4, 0.1

    def masks(w, t):
        kept = np.maximum(keep(w, n, m), dense_groups(w, m, left(t), order))
        return kept * (1 + (query(w, n, m, (0,), tau) if given.get("soft", True) else 0))

    def gradient_at(w, t):
        mask = masks(w, t)
        return gradient(w * mask) + given.get("lambda_w", 0) * (1 - np.minimum(mask, 1)) * w

    ramp = nmjax.linear_ramp(0, END)
    sparsifier = methods.max_q(plan_of("1:4"), ramp, temperature=tau, **given)
    weights, state, _ = train(sparsifier, optax.sgd(0.02, momentum=0.9))
    np.testing.assert_allclose(weights, replay(gradient_at, sgd(0.02)), atol=1e-5)
    params = {"kernel": jnp.asarray(weights[-1])}
    expected = weights[-1] * masks(weights[-1], END)
    np.testing.assert_allclose(sparsifier.export(params, state)["kernel"], expected, atol=1e-5)
    early = sparsifier.refresh(state, params, 5)
    with pytest.raises(ValueError, match=r"after step 14, and the last was at step 5"):
        sparsifier.export(params, early)


def test_the_ramp_on_n_drops_more_and_more_of_each_group():
    sparsifier = methods.max_q(plan_of("1:8"), nmjax.linear_ramp(0, END), ramp_on="n", soft=False)
    state = sparsifier.init({"kernel": jnp.asarray(W)}, jax.random.key(0))

    @jax.jit
    def at(step):
        params = {"kernel": jnp.asarray(W, jnp.float32)}
        return sparsifier.apply(params, sparsifier.refresh(state, params, step))["kernel"]

    for step in range(END + 2):
        dropped = int(7 * (1 - left(step)) + 1e-9)
        np.testing.assert_allclose(at(step), W * keep(W, 8 - dropped, 8), rtol=1e-6)


@pytest.mark.slow
def test_taps_of_a_convolution_are_queried_too():
    w = np.random.default_rng(0).normal(size=(3, 3, 4, 2)).astype(np.float32)
    params = {"conv": {"kernel": jnp.asarray(w)}}
    plan = nmjax.make_plan(params, "1:4")
    sparsifier = methods.max_q(plan, None, temperature=0.5)
    sparse = sparsifier.apply(params, sparsifier.init(params, jax.random.key(0)))
    soft = query(w, 1, 4, (0, 1, 2), 0.5) + query(w, 1, 4, (2, 3), 0.5)
    np.testing.assert_allclose(
        sparse["conv"]["kernel"], w * keep(w, 1, 4, axis=2) * (1 + soft), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ramp": 3}, TypeError, "ramp must be a function"),
        ({"ramp": None, "soft": False}, ValueError, "nothing is left but STE"),
        ({"ramp_on": "m"}, ValueError, "ramp_on must be"),
        ({"dense_longest": "random"}, ValueError, "dense_longest must be"),
        ({"soft": 1}, TypeError, "soft must be True or False"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
        ({"lambda_w": "x"}, TypeError, "lambda_w must be a number"),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        methods.max_q(plan_of("1:4"), **{"ramp": nmjax.linear_ramp(0, 1), **change})
