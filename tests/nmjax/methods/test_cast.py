"""CAST's AdamS against NumPy, and the end of training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nmjax import methods
from tests.nmjax.methods.replay import (
    PARAMS,
    STEPS,
    W,
    average,
    gradient,
    keep,
    plan_of,
    replay,
    train,
)

RATE, B1, B2, EPS, LAMBDA, EVERY, END = 0.02, 0.9, 0.99, 1e-8, 0.05, 4, 18


class AdamS:
    def __init__(self):
        self.m, self.v, self.t = np.zeros_like(W), np.zeros_like(W), 0

    def gradient_at(self, w, t):
        if t % EVERY == 0 or t >= END:
            self.kept = keep(w, 2, 4)
        return gradient(w * self.kept if t >= END else w)

    def __call__(self, w, g):
        self.t += 1
        alpha = min(self.t / END, 1)
        self.m = average(self.m, g, B1)
        pulled = (1 - alpha) * self.m + alpha * LAMBDA * np.sign(w)
        u = np.where(self.kept, self.m, pulled)
        self.v = average(self.v, u**2, B2)
        return w - RATE * (u / (1 - B1**self.t)) / (np.sqrt(self.v / (1 - B2**self.t)) + EPS)


def make():
    return methods.cast(plan_of("2:4"), END, lambda_w=LAMBDA, refresh_every=EVERY, b2=B2)


def test_training_is_that_of_the_formula():
    sparsifier, adam_s, _ = make()
    tx = optax.chain(adam_s, optax.scale_by_learning_rate(RATE))
    weights, state, _ = train(sparsifier, tx, extra=lambda state: {"masks": state.masks})
    reference = AdamS()
    np.testing.assert_allclose(weights, replay(reference.gradient_at, reference), atol=1e-5)
    params = {"kernel": jnp.asarray(weights[-1])}
    exported = sparsifier.export(params, state)
    np.testing.assert_array_equal(exported["kernel"], weights[-1] * reference.kept)
    assert int(state.step) == STEPS - 1


def test_unfinished_training_is_not_exported():
    sparsifier, _, _ = make()
    state = sparsifier.init(PARAMS, jax.random.key(0))
    state = sparsifier.refresh(state, PARAMS, END - 1)
    np.testing.assert_array_equal(sparsifier.apply(PARAMS, state)["kernel"], PARAMS["kernel"])
    with pytest.raises(ValueError, match=r"after step 18, and the last was at step 17"):
        sparsifier.export(PARAMS, state)
    done = sparsifier.refresh(state, PARAMS, END)
    np.testing.assert_array_equal(
        sparsifier.export(PARAMS, done)["kernel"], PARAMS["kernel"] * keep(W, 2, 4)
    )


def test_masks_come_from_the_weights_where_none_are_given():
    sparsifier, adam_s, _ = make()
    masks = sparsifier.init(PARAMS, jax.random.key(0)).masks
    state, grads = adam_s.init(PARAMS), jax.tree.map(jnp.cos, PARAMS)
    given, _ = adam_s.update(grads, state, PARAMS, masks=masks)
    computed, _ = adam_s.update(grads, state, PARAMS)
    np.testing.assert_array_equal(given["kernel"], computed["kernel"])
    with pytest.raises(ValueError, match="not passing `params`"):
        adam_s.update(grads, state)


def test_wrong_arguments():
    sparsifier, adam_s, _ = methods.cast(plan_of("2:4"), 5)
    params = {"kernel": jnp.asarray(W)}
    state, wrong = adam_s.init(params), {"kernel": jnp.ones((1,), bool)}
    with pytest.raises(ValueError, match=r"the mask of kernel has shape \(1,\)"):
        adam_s.update(params, state, params, masks=wrong)
    with pytest.raises(TypeError, match="step counts optimizer steps"):
        sparsifier.refresh(sparsifier.init(params, None), params, None)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        methods.cast(plan_of("2:4"), 0)
    with pytest.raises(TypeError, match="refresh_every must be a Python integer"):
        methods.cast(plan_of("2:4"), 5, refresh_every=2.0)
    with pytest.raises(ValueError, match="b2 is a rate of decay, 0 <= b2 < 1; got 1"):
        methods.cast(plan_of("2:4"), 5, b2=1.0)
    with pytest.raises(TypeError, match="lambda_w must be a number"):
        methods.cast(plan_of("2:4"), 5, lambda_w="x")
