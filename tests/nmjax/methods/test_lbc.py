"""LBC against NumPy, candidate by candidate."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax
from nmjax import methods
from nmjax.methods.with_optimizer._lbc import _live_count
from tests.nmjax.methods.replay import PARAMS, W, gradient, plan_of, replay, sgd, train

RATE, MOMENTUM, DECAY, BEGIN, END = 0.05, 0.9, 0.01, 2, 18


def test_live_candidates_of_the_published_schedule():
    counts = [int(_live_count(6, 0, 60, jnp.int32(epoch))) for epoch in (0, 20, 30, 60, 119)]
    assert counts == [6, 3, 2, 1, 1]


class Candidates:
    """All groups and candidates in loops."""

    def __init__(self, n, m, per_epoch):
        self.m, self.per_epoch, self.t = m, per_epoch, 0
        self.held = list(itertools.combinations(range(m), n))
        self.places = list(itertools.product(range(len(W) // m), range(W.shape[1])))
        first = 1 / math.comb(m - 1, n - 1)
        self.alpha = {place: [first] * len(self.held) for place in self.places}
        self.buffer = {place: [0.0] * len(self.held) for place in self.places}
        self.live = {place: set(range(len(self.held))) for place in self.places}

    def mask(self):
        mask = np.zeros_like(W)
        for (row, column), live in self.live.items():
            for c in live:
                mask[[row * self.m + j for j in self.held[c]], column] = 1
        return mask

    def learn(self, w, g):
        self.t += 1
        epoch = self.t // self.per_epoch * self.per_epoch
        x = min(max((epoch - BEGIN) / (END - BEGIN), 0), 1)
        count = 1 + math.ceil((len(self.held) - 1) * (1 - x) ** 3 - 1e-9)
        for place in self.places:
            alpha, buffer = self.alpha[place], self.buffer[place]
            rows = np.arange(self.m) + place[0] * self.m
            for c, held in enumerate(self.held):
                slope = sum(w[rows[j], place[1]] * g[rows[j], place[1]] for j in held)
                buffer[c] = MOMENTUM * buffer[c] + slope + DECAY * alpha[c]
                alpha[c] -= RATE * buffer[c]
            best = sorted(self.live[place], key=lambda c: -alpha[c])
            self.live[place] = set(best[:count])
            for c in set(range(len(self.held))) - self.live[place]:
                alpha[c] = 0.0


@pytest.mark.parametrize(("pattern", "per_epoch"), [("2:4", 1), ("1:4", 4)])
def test_training_is_that_of_the_formula(pattern, per_epoch):
    n, m = map(int, pattern.split(":"))
    method = methods.lbc(
        plan_of(pattern), BEGIN, END, RATE, weight_decay=DECAY, steps_per_epoch=per_epoch
    )
    tx = optax.chain(method.transformation, optax.sgd(RATE, momentum=0.9))
    weights, state, opt_state = train(method.sparsifier, tx, follow=method.follow)

    reference = Candidates(n, m, per_epoch)

    def gradient_at(w, t):
        mask = reference.mask()
        g = gradient(w * mask)
        reference.learn(w, g)
        return g * mask

    np.testing.assert_allclose(weights, replay(gradient_at, sgd(RATE)), atol=1e-5)
    np.testing.assert_array_equal(state.masks["kernel"], reference.mask())
    scores = np.asarray(opt_state[0].scores["kernel"])  # (columns, groups, candidates)
    for (row, column), alpha in reference.alpha.items():
        np.testing.assert_allclose(scores[column, row], alpha, atol=1e-5)
    exported = method.sparsifier.export({"kernel": jnp.asarray(weights[-1])}, state)
    np.testing.assert_array_equal(exported["kernel"], weights[-1] * reference.mask())


def test_unfinished_schedule_is_not_exported():
    sparsifier = methods.lbc(plan_of("2:4"), BEGIN, END, RATE).sparsifier
    with pytest.raises(ValueError, match=r"(?s)after update 18.*\n  kernel \(16, 4\)"):
        sparsifier.export(PARAMS, sparsifier.init(PARAMS, jax.random.key(0)))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"kernel \(16, 4\): 8:16 has 12,870 candidates"):
        methods.lbc(plan_of("8:16"), 0, 1, RATE)
    with pytest.raises(ValueError, match="steps_per_epoch must be at least 1"):
        methods.lbc(plan_of("2:4"), 0, 1, RATE, steps_per_epoch=0)
    with pytest.raises(ValueError, match="lbc needs N:M patterns"):
        methods.lbc(nmjax.make_plan(PARAMS, "1x2@0.5"), 0, 1, RATE)
    method = methods.lbc(plan_of("2:4"), 0, 1, RATE).transformation
    with pytest.raises(ValueError, match="not passing `params`"):
        method.update(PARAMS, method.init(PARAMS))
    with pytest.raises(ValueError, match="there are none of kernel; train them"):
        method.update({"kernel": None}, method.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="learning_rate must be a number"):
        methods.lbc(plan_of("2:4"), 0, 1, "x")
