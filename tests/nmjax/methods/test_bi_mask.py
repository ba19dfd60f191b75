"""Bi-Mask, against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax
from nmjax import methods
from tests.nmjax.methods.replay import PARAMS, RNG, W, X, Y, keep, plan_of, sgd

RATE, LAMBDA, EVERY, STEPS = 0.05, 0.1, 5, 22
HIDDEN = 0.3 * RNG.normal(size=(16, 16))


def backward_mask(w, order):
    """N:M of the sparse weight along its outputs in an order, as the released code computes it."""
    kept = keep(w, 2, 4)
    mask = keep((w * kept)[:, order], 2, 4, axis=1)
    return kept * mask[:, np.argsort(order)]


def test_training_is_that_of_the_formula():
    params = {"a": jnp.asarray(HIDDEN, jnp.float32), "b": PARAMS["kernel"]}
    plan = nmjax.make_plan(params, "2:4", axes={"a|b": -2})
    sparsifier = methods.bi_mask(plan, lambda_w=LAMBDA, refresh_every=EVERY, tries=3)
    tx = optax.sgd(RATE, momentum=0.9)
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)

    @jax.jit
    def step(params, state, opt_state, count):
        state = sparsifier.refresh(state, params, count)

        def loss_fn(params):
            sparse = sparsifier.apply(params, state)
            back = methods.backward_weights(params, plan, state)
            hidden = methods.training_matmul(x, sparse["a"], backward=back["a"])
            output = methods.training_matmul(hidden, sparse["b"], backward=back["b"])
            return 0.5 * jnp.sum((output - y) ** 2) / len(X)

        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state

    a, b, step_a, step_b = HIDDEN, W, sgd(RATE), sgd(RATE)
    state, opt_state = sparsifier.init(params, jax.random.key(0)), tx.init(params)
    seen = set()
    for count in range(STEPS):
        params, state, opt_state = step(params, state, opt_state, count)
        order = np.asarray(state.orders["b"])
        seen.add(tuple(order))
        kept_a, kept_b = keep(a, 2, 4), keep(b, 2, 4)
        error = (X @ (a * kept_a) @ (b * kept_b) - Y) / len(X)
        grad_a = X.T @ error @ (b * backward_mask(b, order)).T
        grad_b = (X @ (a * kept_a)).T @ error
        a = step_a(a, grad_a + LAMBDA * (1 - kept_a) * a)
        b = step_b(b, grad_b + LAMBDA * (1 - kept_b) * b)
        np.testing.assert_allclose(params["a"], a, atol=1e-5)
        np.testing.assert_allclose(params["b"], b, atol=1e-5)
    assert len(seen) > 1


def test_orders_stay_until_the_next_search():
    wide = {"kernel": jnp.asarray(HIDDEN, jnp.float32)}
    sparsifier = methods.bi_mask(nmjax.make_plan(wide, "2:4"), refresh_every=10, tries=2)
    state = sparsifier.init(wide, jax.random.key(0))
    early = sparsifier.refresh(state, wide, 9)
    np.testing.assert_array_equal(early.orders["kernel"], state.orders["kernel"])
    late = sparsifier.refresh(early, wide, 12)
    assert not np.array_equal(late.orders["kernel"], state.orders["kernel"])
    assert sorted(late.orders["kernel"].tolist()) == list(range(16))


def test_the_search_keeps_most():
    """With many tries it finds the best of all orders of eight outputs: 35 ways to halve them."""
    w = np.random.default_rng(0).normal(size=(8, 8))
    most = max(
        np.sum(backward_mask(w, [*half, *sorted(set(range(8)) - set(half))]))
        for half in itertools.combinations(range(8), 4)
    )
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    plan = nmjax.make_plan(params, "2:4")
    state = methods.bi_mask(plan, tries=300).init(params, jax.random.key(0))
    backward = methods.backward_weights(params, plan, state)["kernel"]
    assert np.count_nonzero(backward) == most
    first = methods.bi_mask(plan, tries=1).init(params, jax.random.key(0))
    assert np.count_nonzero(methods.backward_weights(params, plan, first)["kernel"]) < most


@pytest.mark.parametrize("pattern", ["1:4", nmjax.NM(2, 4, flatten="kernel")])
def test_convolutions_and_stacks_have_a_backward_mask(pattern):
    w = jnp.asarray(RNG.normal(size=(2, 3, 3, 4, 8)), jnp.float32)
    one = {"conv": {"kernel": w[0], "bias": jnp.ones(8)}}
    plan = nmjax.make_plan(one, pattern)
    params = {"conv": {"kernel": w, "bias": jnp.ones((2, 8))}}
    sparsifier = methods.bi_mask(plan, tries=2)
    state = sparsifier.init(params, jax.random.key(0))
    order = np.asarray(state.orders["conv/kernel"])
    assert order.shape == (2, 8)
    sparse = sparsifier.apply(params, state)["conv"]["kernel"]
    backward = np.asarray(methods.backward_weights(params, plan, state)["conv"]["kernel"])
    n = plan["conv/kernel"].pattern.n
    for kept, outputs in zip(backward, order, strict=True):
        groups = kept[..., outputs].reshape(-1, 4)
        assert (np.count_nonzero(groups, axis=1) <= n).all()
    np.testing.assert_array_equal(np.where(backward != 0, sparse, 0), backward)
    assert np.count_nonzero(backward) > 0.5 * np.count_nonzero(sparse)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"(?s)groups of M outputs.*kernel \(16, 4\): 2:8"):
        methods.bi_mask(plan_of("2:8"))
    with pytest.raises(ValueError, match="groups of consecutive weights"):
        methods.bi_mask(plan_of(nmjax.NM(2, 4, stride=2)))
    with pytest.raises(ValueError, match="tries must be at least 1"):
        methods.bi_mask(plan_of("2:4"), tries=0)
    with pytest.raises(TypeError, match="expected a state of type BiMaskState"):
        methods.bi_mask(plan_of("2:4")).apply(PARAMS, ())
