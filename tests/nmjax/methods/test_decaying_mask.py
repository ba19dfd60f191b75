"""Decaying masks against NumPy, their frames, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax
from nmjax import methods
from tests.nmjax.methods.replay import PARAMS, W, gradient, keep, plan_of, replay, sgd, train

BEGIN, END = 3, 17


def beta(t, decay, rate=5.0):
    if t <= BEGIN:
        return 1.0
    if t >= END:
        return 0.0
    x = (t - BEGIN) / (END - BEGIN)
    return 1 - x if decay == "linear" else np.exp(-rate * x)


@pytest.mark.parametrize(
    ("decay", "kind", "lambda_w"),
    [
        ("linear", "straight", None),
        ("exponential", "straight", 0.1),
        ("exponential", "scaled", 0.1),
    ],
)
def test_training_is_that_of_the_formula(decay, kind, lambda_w):
    def gradient_at(w, t):
        kept = keep(w, 1, 4)
        share = kept + beta(t, decay) * (1 - kept)
        g = gradient(w * share)
        return (g * share if kind == "scaled" else g) + (lambda_w or 0) * (1 - kept) * w

    sparsifier = methods.decaying_mask(
        plan_of("1:4"), BEGIN, END, decay=decay, gradient=kind, lambda_w=lambda_w
    )
    weights, state, _ = train(sparsifier, optax.sgd(0.05, momentum=0.9))
    np.testing.assert_allclose(weights, replay(gradient_at, sgd(0.05)), atol=1e-5)
    masks = [keep(w, 1, 4) for w in weights]
    assert len({mask.tobytes() for mask in masks}) > 2  # The masks do change.
    exported = sparsifier.export({"kernel": jnp.asarray(weights[-1])}, state)
    np.testing.assert_array_equal(exported["kernel"], weights[-1] * masks[-1])


FRAMES = {
    ("1:16", "stepwise"): [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)],
    ("2:4", "stepwise"): [(3, 4), (2, 4)],
    ("4:8", "stepwise"): [(7, 8), (4, 8)],
    ("3:4", "stepwise"): [(3, 4)],
    ("1:2", "geometric"): [(8, 16), (4, 8), (2, 4), (1, 2)],
    ("1:2", "densify"): [(1, 16), (1, 8), (1, 4), (1, 2)],
}


@pytest.mark.parametrize(("pattern", "decay"), FRAMES)
def test_frames_of_the_structure_are_equally_long(pattern, decay):
    frames = FRAMES[pattern, decay]
    sparsifier = methods.decaying_mask(plan_of(pattern), BEGIN, END, decay=decay)
    state = sparsifier.init(PARAMS, jax.random.key(0))
    apply = jax.jit(lambda step: sparsifier.apply(PARAMS, sparsifier.refresh(state, PARAMS, step)))
    for step in (0, BEGIN - 1, BEGIN, 5, 6, 8, 9, 12, 14, END - 1, END, 100):
        frame = (step - BEGIN) * len(frames) // (END - BEGIN)
        n, m = frames[min(frame, len(frames) - 1)] if step >= BEGIN else (1, 1)
        np.testing.assert_array_equal(apply(step)["kernel"], PARAMS["kernel"] * keep(W, n, m))


def test_a_structure_that_decays_trains_straight_through_and_pulls():
    def gradient_at(w, t):
        frame = min((t - BEGIN) * 5 // (END - BEGIN), 4)
        kept = keep(w, (15, 8, 4, 2, 1)[frame], 16) if t >= BEGIN else np.ones_like(w)
        return gradient(w * kept) + 0.1 * (1 - kept) * w

    sparsifier = methods.decaying_mask(plan_of("1:16"), BEGIN, END, decay="stepwise", lambda_w=0.1)
    weights, _, _ = train(sparsifier, optax.sgd(0.05, momentum=0.9))
    np.testing.assert_allclose(weights, replay(gradient_at, sgd(0.05)), atol=1e-5)


@pytest.mark.not_under("jax_debug_nans")
def test_pruned_weights_that_are_not_finite_end_at_zero():
    params = {"kernel": jnp.array([[jnp.inf], [jnp.inf], [jnp.inf], [1.0]])}
    plan = nmjax.make_plan(params, "2:4")
    sparsifier = methods.decaying_mask(plan, 0, 2)
    state = sparsifier.refresh(sparsifier.init(params, jax.random.key(0)), params, 2)
    assert sparsifier.apply(params, state)["kernel"].ravel().tolist() == [jnp.inf, jnp.inf, 0, 0]


@pytest.mark.parametrize("decay", ["linear", "stepwise"])
def test_unfinished_decay_is_not_exported(decay):
    sparsifier = methods.decaying_mask(plan_of("1:4"), BEGIN, END, decay=decay)
    state = sparsifier.refresh(sparsifier.init(PARAMS, jax.random.key(0)), PARAMS, 5)
    with pytest.raises(
        ValueError, match=r"(?s)at or after step 1\d, and the last was at step 5.*kernel"
    ):
        sparsifier.export(PARAMS, state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"begin": 17}, ValueError, "0 <= begin < end"),
        ({"begin": -1}, ValueError, "0 <= begin < end"),
        ({"end": 17.0}, TypeError, "end must be a Python integer"),
        ({"decay": "cubic"}, ValueError, "decay must be one of exponential, linear"),
        ({"rate": 0}, ValueError, "rate must be positive"),
        ({"gradient": "none"}, ValueError, "gradient must be"),
        ({"decay": "stepwise", "gradient": "scaled"}, ValueError, "needs a mask that decays"),
        ({"lambda_w": "0.1"}, TypeError, "lambda_w must be a number"),
        (
            {"decay": "geometric"},
            ValueError,
            r"kernel \(16, 4\): 16 inputs are not a multiple of 32",
        ),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"begin": BEGIN, "end": END, **change}
    with pytest.raises(error, match=message):
        methods.decaying_mask(plan_of("1:4"), **arguments)


def test_blocks_have_no_structure_to_decay():
    plan = nmjax.make_plan(PARAMS, "1x2@0.5")
    with pytest.raises(ValueError, match="which has no M"):
        methods.decaying_mask(plan, 0, 1, decay="stepwise")
