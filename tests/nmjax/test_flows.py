"""From training to a served network: what ships computes what was evaluated in training.

Each method trains a network of each framework for a few steps. Then the network is exported,
packed, saved, loaded and served, with the calls that the guide shows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nmjax
import nmjax.linen
import nmjax.nnx

KEYS = jax.random.split(jax.random.key(0), 4)
X, Y = jax.random.normal(KEYS[0], (32, 16)), jax.random.normal(KEYS[1], (32, 8))
STEPS, PER_EPOCH = 24, 4


class Framework(NamedTuple):
    """A network of a framework.

    Attributes:
      params: its parameters.
      run: (params, x) -> outputs.
      make_plan: pattern -> plan.
      ship: (exported params, plan, path) -> a function of the input. It packs, saves and loads.
    """

    params: Any
    run: Callable[..., jax.Array]
    make_plan: Callable[[str], nmjax.Plan]
    ship: Callable[..., Callable[[jax.Array], jax.Array]]


def through_a_file(params, plan, path):
    nmjax.save_packed(path, nmjax.pack(params, plan))
    return nmjax.load_packed(path, like=params)


def functional_framework(params, run):
    """The same function runs on dense and on packed weights, which multiply with `@`."""

    def make_plan(pattern):
        return nmjax.make_plan(params, pattern, forward=run, inputs=(X,))

    def ship(exported, plan, path):
        packed = through_a_file(exported, plan, path)
        return jax.jit(lambda x: run(packed, x))

    return Framework(params, run, make_plan, ship)


def plain_dict():
    params = {
        "up": {"kernel": jax.random.normal(KEYS[2], (16, 32)) / 4, "bias": jnp.zeros(32)},
        "down": {"kernel": jax.random.normal(KEYS[3], (32, 8)) / 6, "bias": jnp.zeros(8)},
    }

    def run(params, x):
        hidden = nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"][None])
        return hidden @ params["down"]["kernel"] + params["down"]["bias"][None]

    return functional_framework(params, run)


def linen():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(16, (3,))(x.reshape(-1, 2, 8)))
            return nn.Dense(8)(x.reshape(-1, 32))

    model = Network()
    variables = model.init(KEYS[2], X)

    def ship(exported, plan, path):
        packed = through_a_file(exported, plan, path)
        return jax.jit(lambda x: nmjax.linen.packed_apply(model)({"params": packed}, x))

    return Framework(
        variables["params"],
        lambda params, x: model.apply({"params": params}, x),
        lambda pattern: nmjax.linen.make_plan(model, pattern, X),
        ship,
    )


def flax_nnx():
    def make():
        rngs = nnx.Rngs(2)
        return nnx.Sequential(nnx.Linear(16, 32, rngs=rngs), nn.relu, nnx.Linear(32, 8, rngs=rngs))

    model = make()

    def ship(exported, plan, path):
        nnx.update(model, exported)
        nmjax.nnx.save(path, nmjax.nnx.pack(model, plan))
        served = nmjax.nnx.load(path, make())
        return lambda x: nnx.jit(lambda served, x: served(x))(served, x)

    return Framework(
        nnx.state(model, nnx.Param),
        lambda params, x: nmjax.nnx.with_params(model, params)(x),
        lambda pattern: nmjax.nnx.make_plan(model, pattern, inputs=(X,)),
        ship,
    )


class EquinoxNetwork(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


def equinox():
    model = EquinoxNetwork(eqx.nn.Linear(16, 32, key=KEYS[2]), eqx.nn.Linear(32, 8, key=KEYS[3]))

    return functional_framework(model, lambda model, x: jax.vmap(model)(x))


FRAMEWORKS = {"dict": plain_dict, "linen": linen, "nnx": flax_nnx, "equinox": equinox}


class Method(NamedTuple):
    """A method of training, and the strength of its pull on pruned weights."""

    pattern: str
    make: Callable[[nmjax.Plan], nmjax.Sparsifier]
    lambda_w: float = 0.0


METHODS = {
    "ste": Method("2:4", nmjax.straight_through),
    "sr_ste": Method("2:4", nmjax.straight_through, 0.05),
    "one_shot": Method("2:4", lambda plan: nmjax.one_shot(plan, at_step=PER_EPOCH)),
    "subp": Method(
        "1x4@0.5",
        lambda plan: nmjax.soft_uniform_blocks(plan, nmjax.cubic_ramp(0, STEPS - PER_EPOCH)),
        0.05,
    ),
}
REMEMBERS = ("one_shot", "subp")


def train(network, plan, method):
    """The trained parameters, the sparsifier and its state."""
    sparsifier = method.make(plan)
    tx = optax.chain(nmjax.add_sparse_refined(plan, method.lambda_w), optax.sgd(0.05, momentum=0.9))

    @jax.jit
    def step(params, opt_state, state):
        def loss(params):
            return jnp.mean((network.run(sparsifier.apply(params, state), X) - Y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        masks = {"masks": state.masks} if hasattr(state, "masks") else {}
        updates, opt_state = tx.update(grads, opt_state, params, **masks)
        return optax.apply_updates(params, updates), opt_state, value

    params, refresh, losses = network.params, jax.jit(sparsifier.refresh), []
    state, opt_state = sparsifier.init(params, jax.random.key(1)), tx.init(params)
    for count in range(STEPS):
        if count % PER_EPOCH == 0:
            state = refresh(state, params, count)
        params, opt_state, loss = step(params, opt_state, state)
        losses.append(loss)
    assert losses[-1] < losses[0]
    return params, sparsifier, state


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
def test_what_a_score_of_ones_own_keeps_ships(pattern, tmp_path):
    network = plain_dict()
    # Ranks the zeros of pruned weights first.
    plan = nmjax.make_plan(network.params, pattern, score=lambda w: -jnp.abs(w))
    pruned = nmjax.prune(network.params, plan)
    packed = through_a_file(pruned, plan, tmp_path / "network.safetensors")
    jax.tree.map(np.testing.assert_array_equal, nmjax.unpack(packed), pruned)
    expected = network.run(pruned, X)
    np.testing.assert_allclose(network.run(packed, X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_ships_is_what_was_trained(framework, method, tmp_path):
    network = FRAMEWORKS[framework]()
    plan = network.make_plan(METHODS[method].pattern)
    assert len(plan) == 2
    params, sparsifier, state = train(network, plan, METHODS[method])
    evaluated = network.run(sparsifier.apply(params, state), X)
    exported = sparsifier.export(params, state)
    nmjax.check_sparse(exported, plan)
    serve = network.ship(exported, plan, tmp_path / "network.safetensors")
    np.testing.assert_allclose(serve(X), evaluated, rtol=1e-4, atol=1e-5)
    # The same by rank of the dense weights would be another network, for methods that remember.
    ranked = network.run(nmjax.prune(params, plan), X)
    assert (np.abs(ranked - evaluated).max() > 1e-2) == (method in REMEMBERS)
