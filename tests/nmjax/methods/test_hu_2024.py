"""Transposable masks with a decay, against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax
from nmjax import methods
from tests.nmjax.methods.replay import (
    PARAMS,
    STEPS,
    W,
    average,
    gradient,
    plan_of,
    replay,
    train,
)

RATE, LAMBDA, EVERY = 0.02, 0.1, 5
ROWS = [np.isin(range(4), kept) for kept in itertools.combinations(range(4), 2)]
TILES = [np.array(t) for t in itertools.product(ROWS, repeat=4) if (np.sum(t, axis=0) == 2).all()]


def transposable(w):
    """The best of all 90 tiles, tile by tile."""
    mask = np.zeros_like(w)
    for i, j in itertools.product(range(0, w.shape[0], 4), range(0, w.shape[1], 4)):
        tile = np.abs(w[i : i + 4, j : j + 4])
        mask[i : i + 4, j : j + 4] = max(TILES, key=lambda kept: (tile * kept).sum())
    return mask


class Adam:
    def __init__(self):
        self.m, self.v, self.t = np.zeros_like(W), np.zeros_like(W), 0

    def __call__(self, w, g):
        self.t += 1
        self.m, self.v = average(self.m, g, 0.9), average(self.v, g**2, 0.999)
        return w - RATE * (self.m / (1 - 0.9**self.t)) / (
            np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8
        )


@pytest.mark.not_under("jax_numpy_dtype_promotion")
@pytest.mark.parametrize("dense_from", [None, 17])
def test_training_is_that_of_the_formula(dense_from):
    kept = {}

    def gradient_at(w, t):
        if t % EVERY == 0:
            kept["now"] = transposable(w)
        if dense_from is not None and t >= dense_from:
            return gradient(w)
        return gradient(w * kept["now"]) + LAMBDA * (1 - kept["now"]) * w

    sparsifier, decay, _ = methods.hu_2024(
        plan_of("2:4"), refresh_every=EVERY, lambda_w=LAMBDA, dense_from=dense_from
    )
    tx = optax.chain(decay, optax.adam(RATE))
    weights, state, _ = train(sparsifier, tx, extra=lambda state: {"masks": state.masks})
    np.testing.assert_allclose(weights, replay(gradient_at, Adam()), atol=1e-5)
    params = {"kernel": jnp.asarray(weights[-1])}
    if dense_from is None:
        np.testing.assert_array_equal(
            sparsifier.export(params, state)["kernel"], weights[-1] * kept["now"]
        )
        assert int(state.step) == STEPS - 1
    else:
        with pytest.raises(ValueError, match="trains dense from step 17 on"):
            sparsifier.export(params, state)


def test_a_loop_that_skips_the_multiples_refreshes_too():
    sparsifier = methods.hu_2024(plan_of("2:4"), refresh_every=10).sparsifier
    state = sparsifier.init(PARAMS, jax.random.key(0))
    other = {"kernel": PARAMS["kernel"][::-1]}
    early = sparsifier.refresh(state, other, 9)
    np.testing.assert_array_equal(early.masks["kernel"], state.masks["kernel"])
    late = sparsifier.refresh(early, other, 13)
    np.testing.assert_array_equal(late.masks["kernel"], transposable(W[::-1]))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"(?s)tiles of M x M.*kernel \(16, 4\): 2:8"):
        methods.hu_2024(plan_of("2:8"))
    with pytest.raises(ValueError, match="groups of consecutive weights"):
        methods.hu_2024(plan_of(nmjax.NM(2, 4, stride=2)))
    with pytest.raises(ValueError, match="refresh_every must be at least 1"):
        methods.hu_2024(plan_of("2:4"), refresh_every=0)
    with pytest.raises(TypeError, match="dense_from must be a Python integer"):
        methods.hu_2024(plan_of("2:4"), dense_from=1.5)
    sparsifier = methods.hu_2024(plan_of("2:4")).sparsifier
    with pytest.raises(TypeError, match="expected a state of type Hu2024State"):
        sparsifier.apply(PARAMS, jax.random.key(0))
