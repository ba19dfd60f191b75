"""S-STE against NumPy, and its scale for Gaussian weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax
from nmjax import methods
from tests.nmjax.methods.replay import PARAMS, W, gradient, plan_of, replay, sgd, train

# Of 200,000 groups of standard normal weights.
SCALES = {(2, 4): 1.483, (4, 8): 1.562, (1, 4): 1.888, (1, 8): 2.489, (1, 16): 3.132}


def soften(w, n, m, axis=0):
    """sign(w) (|w| - t) where |w| > t, with t the (m - n)-th smallest of the group."""
    moved = np.moveaxis(w, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, m)
    t = np.sort(np.abs(groups), axis=-1)[..., m - n - 1, None] if n < m else 0
    soft = np.where(np.abs(groups) > t, np.sign(groups) * (np.abs(groups) - t), 0)
    return np.moveaxis(soft.reshape(moved.shape), -1, axis)


@pytest.mark.not_under("jax_debug_nans")
def test_a_weight_that_is_not_a_number_stays_visible():
    params = {"kernel": jnp.array([[jnp.nan], [3.0], [2.0], [1.0]])}
    sparsifier = methods.s_ste(nmjax.make_plan(params, "2:4"))
    state = methods.SSteState({"kernel": jnp.ones(())})
    sparse = sparsifier.apply(params, state)["kernel"].ravel()
    np.testing.assert_array_equal(sparse, [np.nan, 1, 0, 0])


@pytest.mark.parametrize(("n", "m"), SCALES)
def test_scale_of_gaussian_weights(n, m):
    w = np.random.default_rng(0).normal(size=(m, 2**17)).astype(np.float32)
    assert float(methods.s_ste_scale(w, n, m)) == pytest.approx(SCALES[n, m], abs=0.01)


@pytest.mark.parametrize("pattern", ["2:4", "3:8"])
def test_training_is_that_of_the_formula(pattern):
    n, m = map(int, pattern.split(":"))
    start = soften(W, n, m)
    beta = (W * start).sum() / (start**2).sum()
    weights, state, _ = train(methods.s_ste(plan_of(pattern)), optax.sgd(0.05, momentum=0.9))
    expected = replay(lambda w, t: gradient(beta * soften(w, n, m)), sgd(0.05))
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    assert float(state.scales["kernel"]) == pytest.approx(beta, rel=1e-5)
    exported = methods.s_ste(plan_of(pattern)).export({"kernel": jnp.asarray(weights[-1])}, state)
    np.testing.assert_allclose(exported["kernel"], beta * soften(weights[-1], n, m), atol=1e-5)


def test_groups_of_several_axes():
    """The kernel of an attention's output: groups run over heads and their dimensions."""
    w = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    params = {"out": jnp.asarray(w)}
    plan = nmjax.make_plan(params, "1:6", axes={"out": (-3, -2)})
    with pytest.warns(UserWarning, match=r"out \(1:6\)"):
        sparsifier = methods.s_ste(plan)
    sparse = sparsifier.apply(params, sparsifier.init(params, jax.random.key(0)))["out"]
    soft = soften(w.reshape(12, 2), 1, 6).reshape(w.shape)
    np.testing.assert_allclose(sparse, soft * (w * soft).sum() / (soft**2).sum(), rtol=1e-5)


def test_groups_whose_members_lie_apart():
    plan = plan_of(nmjax.NM(1, 4, stride=2))
    sparse = methods.s_ste(plan)
    state = sparse.init(PARAMS, jax.random.key(0))
    # Members r, r + 2, r + 4 and r + 6 of every eight.
    order = np.arange(16).reshape(2, 4, 2).swapaxes(1, 2).ravel()
    soft = np.empty_like(W)
    soft[order] = soften(W[order], 1, 4)
    found = sparse.apply(PARAMS, state)["kernel"]
    np.testing.assert_allclose(found, soft * (W * soft).sum() / (soft**2).sum(), rtol=1e-5)


def test_weights_without_a_scale_stay():
    ties = {"kernel": jnp.ones((4, 1))}
    sparsifier = methods.s_ste(nmjax.make_plan(ties, "2:4"))
    state = sparsifier.init(ties, jax.random.key(0))
    assert float(state.scales["kernel"]) == 1
    assert not sparsifier.apply(ties, state)["kernel"].any()


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"(?s)s_ste needs N:M.*kernel \(16, 4\): 1x2@0.5"):
        methods.s_ste(nmjax.make_plan(PARAMS, "1x2@0.5"))
    sparsifier = methods.s_ste(plan_of("2:4"))
    with pytest.raises(TypeError, match="expected a state of type SSteState"):
        sparsifier.apply(PARAMS, ())
