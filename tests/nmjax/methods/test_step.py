"""STEP, with each of its switches, against NumPy."""

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

RATE, B1, B2, EPS = 0.02, 0.9, 0.8, 1e-8
WINDOW = 5  # 1 / (1 - B2)


class Step:
    """Algorithm and switch of STEP, one update at a time."""

    def __init__(self, switch, least, most, threshold, correct):
        self.switch, self.least, self.most = switch, least, most
        self.threshold, self.correct = threshold, correct
        self.m, self.v, self.t, self.frozen_at = np.zeros_like(W), np.zeros_like(W), 0, None
        self.seen = []

    def gradient_at(self, w, t):
        return gradient(w * keep(w, 1, 4) if self.frozen_at else w)

    def __call__(self, w, g):
        self.t += 1
        t = self.t
        self.m = average(self.m, g, B1)
        if self.frozen_at is None:
            before, self.v = self.v, average(self.v, g**2, B2)
            correction, eps = 1 - B2**t, EPS
        else:
            before = self.v
            correction, eps = 1 - B2**self.frozen_at if self.correct else 1, EPS**0.75
        w = w - RATE * (self.m / (1 - B1**t)) / (np.sqrt(self.v / correction) + eps)
        change = np.abs(self.v - before)
        if self.frozen_at is None:
            self.seen.append(
                {
                    "settled": self.v.mean() / (1 - B2**t),
                    "absolute": change.mean(),
                    "absolute_geometric": np.exp(np.log(np.maximum(change, 1e-38)).mean()),
                }[self.switch]
            )
            if t > self.most or (t > self.least and self.is_low()):
                self.frozen_at = t
        return w

    def is_low(self):
        if self.switch != "settled":
            return np.mean(self.seen[-WINDOW:]) < self.threshold
        if len(self.seen) <= WINDOW:
            return False
        old, new = self.seen[-WINDOW - 1], self.seen[-1]
        return abs(new - old) < self.threshold * new


CASES = {
    "settled": ("settled", 2, 20, 0.5, True),
    "settled at the latest": ("settled", 2, 9, 1e-9, True),
    "published": ("absolute", 2, 20, 0.05, False),
    "published at the earliest": ("absolute", 4, 20, 1e9, True),
    "geometric": ("absolute_geometric", 2, 20, 0.006, True),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.slow] * ("at" in name.split())) for name in CASES],
)
def test_training_is_that_of_the_formula(case):
    switch, least, most, threshold, correct = CASES[case]
    method = methods.step(
        plan_of("1:4"), least, most, switch=switch, threshold=threshold, correct_bias=correct, b2=B2
    )
    tx = optax.chain(method.transformation, optax.scale_by_learning_rate(RATE))
    weights, state, opt_state = train(method.sparsifier, tx, follow=method.follow)
    expected = Step(*CASES[case])
    np.testing.assert_allclose(weights, replay(expected.gradient_at, expected), atol=1e-5)
    assert int(opt_state[0].switched_at) == expected.frozen_at
    # The switch is where the case says, and inside of the run.
    assert least < expected.frozen_at <= most + 1 < STEPS
    at_an_edge = {"settled at the latest": most + 1, "published at the earliest": least + 1}
    if case in at_an_edge:
        assert expected.frozen_at == at_an_edge[case]
    else:
        assert least + 1 < expected.frozen_at < most
    exported = method.sparsifier.export({"kernel": jnp.asarray(weights[-1])}, state)
    np.testing.assert_array_equal(exported["kernel"], weights[-1] * keep(weights[-1], 1, 4))


def test_only_the_absolute_switch_depends_on_the_scale_of_the_loss():
    def frozen_at(switch, scale):
        tx = methods.step(plan_of("1:4"), 2, 20, switch=switch, b2=B2, threshold=0.3).transformation
        state, grads = tx.init(PARAMS), jax.tree.map(lambda w: scale * jnp.sin(9 * w), PARAMS)

        def body(state, step):
            return tx.update(
                jax.tree.map(lambda g: g * (1 + 1 / jnp.float32(1 + step)), grads), state
            )[1], None

        return int(jax.lax.scan(body, state, jnp.arange(STEPS))[0].switched_at)

    assert frozen_at("settled", 1.0) == frozen_at("settled", 1e-3)
    assert frozen_at("absolute", 10.0) != frozen_at("absolute", 1e-3) == 3


def test_export_before_the_switch():
    sparsifier = methods.step(plan_of("1:4"), 2, 9).sparsifier
    with pytest.raises(ValueError, match=r"at the latest after update 10.*\n  kernel"):
        sparsifier.export(PARAMS, sparsifier.init(PARAMS, jax.random.key(0)))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="0 <= min_steps < max_steps"):
        methods.step(plan_of("1:4"), 5, 5)
    with pytest.raises(ValueError, match="b2 is a rate of decay, 0 <= b2 < 1; got 1"):
        methods.step(plan_of("2:4"), 1, 2, b2=1.0)
    with pytest.raises(TypeError, match="threshold must be a number"):
        methods.step(plan_of("2:4"), 1, 2, threshold="x")
    with pytest.raises(ValueError, match="switch must be"):
        methods.step(plan_of("1:4"), 1, 2, switch="auto")
    method = methods.step(plan_of("1:4"), 1, 2)
    with pytest.raises(ValueError, match=r"one ScaleByStepState.*found 0"):
        method.follow(None, optax.adam(0.1).init(PARAMS))
