"""STE and SR-STE as sparsifiers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

import nmjax
from tests.nmjax.methods.cases import KEY, MASKS, PARAMS, PLAN, drift, gradient


def test_straight_through_follows_the_weights():
    sparsifier = nmjax.straight_through(PLAN)
    state = sparsifier.init(PARAMS, KEY)
    for step in range(3):
        params = drift(PARAMS, step)
        chex.assert_trees_all_equal(sparsifier.apply(params, state), nmjax.prune(params, PLAN))
    chex.assert_trees_all_equal(gradient(sparsifier, state), jax.tree.map(jnp.ones_like, PARAMS))


def test_straight_through_with_lambda_pulls():
    sparsifier = nmjax.straight_through(PLAN, lambda_w=0.5)
    grads = gradient(sparsifier, sparsifier.init(PARAMS, KEY))
    for name in "ab":
        w, mask = PARAMS[name]["kernel"], MASKS[f"{name}/kernel"]
        np.testing.assert_allclose(
            grads[name]["kernel"], 1 + 0.5 * jnp.where(mask, 0, w), rtol=1e-6
        )
