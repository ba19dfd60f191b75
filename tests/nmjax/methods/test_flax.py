"""Every method trains a linen and an NNX module to the weights that it gives by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nmjax
import nmjax.nnx
from nmjax import methods
from tests.nmjax.methods.test_steps import KEY, METHODS, PARAMS, PLAN, Row

BLOCKS = nmjax.make_plan(PARAMS, "1x2@0.5")
ROWS = METHODS | {
    "one_shot": Row(lambda: methods.one_shot(PLAN, at_step=1)),
    "soft_uniform_blocks": Row(
        lambda: methods.soft_uniform_blocks(BLOCKS, nmjax.linear_ramp(1, 4))
    ),
}
BY_DEFAULT = ("straight_through", "cast", "sup_tickets")
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(12, 16)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(12, 8)), jnp.float32)
LINEN = nn.Dense(8)
NNX = nnx.Linear(16, 8, rngs=nnx.Rngs(0))


def trained(made, params, forward):
    """The parameters after three steps, as a user's loop takes them."""
    sparsifier, part, follow = (
        made if isinstance(made, methods.Method) else (made, optax.identity(), None)
    )
    tx = optax.chain(part, optax.sgd(0.1, momentum=0.9))

    def step(count, carry):
        params, state, opt_state = carry
        state = sparsifier.refresh(state, params, count)

        def loss_of(params):
            return jnp.mean((forward(sparsifier.apply(params, state), X) - Y) ** 2)

        grads, masks = jax.grad(loss_of)(params), getattr(state, "masks", None)
        updates, opt_state = tx.update(grads, opt_state, params, masks=masks)
        params = optax.apply_updates(params, updates)
        return params, state if follow is None else follow(state, opt_state), opt_state

    @jax.jit
    def run(params):
        start = params, sparsifier.init(params, KEY), tx.init(params)
        return jax.lax.fori_loop(0, 3, step, start)

    params, state, _ = run(params)
    return params, state, sparsifier


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in BY_DEFAULT)) for name in ROWS],
)
def test_modules_train_like_functions(name):
    make = ROWS[name].make
    by_hand, state, sparsifier = trained(
        make(), PARAMS, lambda params, x: x @ params["kernel"] + params["bias"][None]
    )
    in_linen, _, _ = trained(make(), PARAMS, lambda params, x: LINEN.apply({"params": params}, x))
    # The module has the same weights.
    nnx.update(NNX, PARAMS)
    in_nnx, nnx_state, _ = trained(
        make(),
        nnx.state(NNX, nnx.Param),
        lambda params, x: nmjax.nnx.with_params(NNX, params)(x),
    )
    for leaf in PARAMS:
        np.testing.assert_allclose(in_linen[leaf], by_hand[leaf], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(in_nnx[leaf][...], by_hand[leaf], rtol=1e-5, atol=1e-6)
    assert not np.allclose(by_hand["kernel"], PARAMS["kernel"])
    # What the module computes with afterwards is what the functions do.
    sparse = sparsifier.apply(in_nnx, nnx_state)["kernel"][...]
    expected = sparsifier.apply(by_hand, state)["kernel"]
    np.testing.assert_allclose(sparse, expected, rtol=1e-5, atol=1e-6)
