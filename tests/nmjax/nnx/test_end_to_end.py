"""From training to a served network: each method ships the network that was evaluated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nmjax
import nmjax.nnx
from nmjax import methods
from nmjax.methods.schedules import cubic_ramp
from nmjax.packed.weight import is_packed
from tests.nmjax.nnx.networks import Network, normal

X, Y = normal(16, 16), normal(16, 4, seed=2)


def loss_of(model):
    return ((model(X) - Y) ** 2).mean()


def evaluated(model, sparse):
    """Outputs in evaluation, as a training loop computes them."""
    model.eval()
    return sparse(model)(X)


def serve(model, plan, path):
    """Packs, saves, and loads into a fresh network."""
    nmjax.nnx.save(path, nmjax.nnx.pack(model, plan))
    served = nmjax.nnx.load(path, Network(nnx.Rngs(99)))
    served.eval()
    assert all(is_packed(layer.kernel[...]) for layer in (*served.layers, served.head))
    return nnx.jit(lambda model: model(X))(served)


@pytest.mark.not_under("jax_numpy_dtype_promotion")
@pytest.mark.parametrize("pull", [None, 2e-4])
def test_straight_through(pull, tmp_path):
    model = Network(nnx.Rngs(0))
    plan = nmjax.nnx.make_plan(model, "2:4", inputs=(X,))
    tx = optax.chain(
        optax.identity() if pull is None else nmjax.add_sparse_refined(plan, pull), optax.adam(1e-2)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: loss_of(nmjax.nnx.sparsify(m, plan)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0]
    expected = evaluated(model, lambda model: nmjax.nnx.sparsify(model, plan))
    with pytest.raises(ValueError, match="layers/0/kernel"):
        nmjax.check_sparse(nnx.state(model, nnx.Param), plan)
    nmjax.nnx.prune(model, plan)
    got = serve(model, plan, tmp_path / "network.safetensors")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def blocks(plan):
    return methods.soft_uniform_blocks(plan, cubic_ramp(0, 15))


METHODS = {
    "one_shot": ("2:4", methods.one_shot),
    "soft_uniform_blocks": (
        "1x4@0.5",
        blocks,
    ),
}


@pytest.mark.not_under("jax_numpy_dtype_promotion")
@pytest.mark.parametrize("name", METHODS)
def test_methods_that_remember(name, tmp_path):
    pattern, method = METHODS[name]
    model = Network(nnx.Rngs(0))
    plan = nmjax.nnx.make_plan(model, pattern, inputs=(X,))
    sparsifier = method(plan)
    state = sparsifier.init(nnx.state(model, nnx.Param), jax.random.key(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)

    def sparse(model, state):
        params = nnx.state(model, nnx.Param)
        return nmjax.nnx.with_params(model, sparsifier.apply(params, state))

    @nnx.jit
    def step(model, optimizer, state):
        loss, grads = nnx.value_and_grad(lambda m: loss_of(sparse(m, state)))(model)
        optimizer.update(model, grads)
        return loss

    losses = []
    for epoch in range(4):
        state = sparsifier.refresh(state, nnx.state(model, nnx.Param), jnp.array(5 * epoch))
        losses += [float(step(model, optimizer, state)) for _ in range(5)]
    assert losses[-1] < losses[0]
    expected = evaluated(model, lambda model: sparse(model, state))
    with pytest.raises(ValueError, match="head/kernel"):  # The dense weights are another network.
        nmjax.nnx.pack(model, plan)
    exported = sparsifier.export(nnx.state(model, nnx.Param), state)
    pruned = nmjax.nnx.with_params(model, exported)
    got = serve(pruned, plan, tmp_path / "network.safetensors")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
