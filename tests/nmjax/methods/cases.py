"""Parameters, plans, and masks that the tests of methods share."""

import jax
import jax.numpy as jnp
import numpy as np

import nmjax

KEY = jax.random.key(0)


def make_params(key=KEY):
    keys = jax.random.split(key)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (8, 4)), "bias": jnp.ones(4)},
        "b": {"kernel": jax.random.normal(keys[1], (8, 4))},
    }


PARAMS = make_params()
PLAN = nmjax.make_plan(PARAMS, "2:4")
BLOCKS = nmjax.make_plan(PARAMS, "1x2@0.5")
MASKS = nmjax.compute_masks(PARAMS, PLAN)
USER_MASKS = {name: np.asarray(~mask) for name, mask in MASKS.items()}


def drift(params, step):
    """Parameters that change, so that magnitude masks do too."""
    return jax.tree.map(lambda w: w + 0.3 * jnp.float32(step) * jnp.cos(7 * w), params)


def gradient(sparsifier, state):
    return jax.grad(lambda p: sum(jnp.sum(x) for x in jax.tree.leaves(sparsifier.apply(p, state))))(
        PARAMS
    )
