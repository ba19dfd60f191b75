"""Sparse NNX modules train, and share all other variables with the module that they come from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nmjax
import nmjax.nnx
from tests.nmjax.nnx.networks import Network, assert_same, normal

X, Y = normal(8, 16), normal(8, 4, seed=2)


def plan_of(model, pattern="2:4", **selection):
    return nmjax.nnx.make_plan(model, pattern, inputs=(X,), **selection)


def loss_of(model):
    return ((model(X) - Y) ** 2).mean()


def functional_loss(params, rest, graph, plan, lambda_w=None):
    """The loss and the new state, with no module that outlives the call."""
    model = nnx.merge(graph, nmjax.sparsify(params, plan, lambda_w=lambda_w), rest, copy=True)
    loss = loss_of(model)
    return loss, nnx.state(model, nnx.Not(nnx.Param))


@pytest.mark.not_under("jax_numpy_dtype_promotion")
@pytest.mark.parametrize("lambda_w", [None, 0.5])
@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
def test_training_equals_the_functional_loop(pattern, lambda_w):
    """Parameters, statistics and random streams, against split, merge and nmjax.sparsify."""
    model = Network(nnx.Rngs(0))
    plan, tx = plan_of(model, pattern), optax.adam(1e-2)
    graph, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            return loss_of(nmjax.nnx.sparsify(model, plan, lambda_w=lambda_w))

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    @jax.jit
    def functional_step(params, rest, state):
        of_params = jax.value_and_grad(functional_loss, has_aux=True)
        (loss, rest), grads = of_params(params, rest, graph, plan, lambda_w)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state, loss

    for _ in range(4):
        loss = step(model, optimizer)
        params, rest, state, expected = functional_step(params, rest, state)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_same(nnx.state(model, nnx.Param), params, rtol=1e-4, atol=1e-6)
    assert_same(nnx.state(model, nnx.Not(nnx.Param)), rest, rtol=1e-5)
    assert int(model.dropout.rngs.count[...]) == 4
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0
    # Training is dense; only the forward pass is sparse.
    assert int((model.layers[0].kernel[...] == 0).sum()) == 0


def test_the_gradient_of_a_pruned_weight_is_the_straight_through_one():
    model = Network(nnx.Rngs(0))
    model.eval()
    plan = plan_of(model)
    grads = nnx.grad(lambda model: loss_of(nmjax.nnx.sparsify(model, plan)))(model)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def at(sparse):  # The gradient with respect to the sparse weights themselves.
        return loss_of(nnx.merge(graph, sparse, rest, copy=True))

    expected = jax.grad(at)(nmjax.prune(params, plan))
    assert_same(grads, expected, rtol=1e-4, atol=1e-6)
    kernel = grads["layers"][0]["kernel"][...]
    assert (
        np.asarray(kernel)[~np.asarray(nmjax.compute_masks(params, plan)["layers/0/kernel"])]
    ).any()


def test_everything_but_the_planned_parameters_is_shared():
    model = Network(nnx.Rngs(0))
    plan = plan_of(model, exclude="head")
    sparse = nmjax.nnx.sparsify(model, plan)
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(m))) for m in (sparse, model))
    assert ours.keys() == theirs.keys()
    shared = {"/".join(map(str, path)) for path in ours if ours[path] is theirs[path]}
    assert shared == {"/".join(map(str, path)) for path in ours} - plan.keys()
    sparse(X)  # Without any transformation, too.
    assert int(model.dropout.rngs.count[...]) == 1
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0


def test_a_weight_that_two_layers_share_stays_shared():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(nnx.tanh(self.a(x)))

    model = Tied(nnx.Rngs(0))
    plan = plan_of(model)
    assert set(plan) == {"a/kernel"}
    sparse = nmjax.nnx.sparsify(model, plan)
    assert sparse.a.kernel is sparse.b.kernel
    assert int((sparse.b.kernel[...] != 0).sum()) == 128


def test_given_masks_decide():
    model = Network(nnx.Rngs(0))
    plan = plan_of(model, include="head")
    masks = {"head/kernel": jnp.tile(jnp.array([[True], [False]]), (8, 4))}
    sparse = nmjax.nnx.sparsify(model, plan, masks)
    np.testing.assert_array_equal(sparse.head.kernel[...] != 0, masks["head/kernel"])
    nmjax.nnx.prune(model, plan, masks)
    np.testing.assert_array_equal(model.head.kernel[...] != 0, masks["head/kernel"])


def test_prune_is_in_place_and_exact():
    model = Network(nnx.Rngs(0))
    plan = plan_of(model)
    kernel, optimizer = model.layers[0].kernel, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    expected = nmjax.prune(nnx.state(model, nnx.Param), plan)
    expected = jax.tree.map(np.asarray, expected)
    others = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    assert nmjax.nnx.prune(model, plan) is None
    assert_same(nnx.state(model, nnx.Param), expected, rtol=0)
    assert_same(nnx.state(model, nnx.BatchStat), others, rtol=0)
    assert model.layers[0].kernel is kernel  # So that an optimizer goes on with the same variables.
    nmjax.check_sparse(nnx.state(model, nnx.Param), plan)
    optimizer.update(model, nnx.grad(loss_of)(model))

    @nnx.jit
    def prune_in_jit(model):
        nmjax.nnx.prune(model, plan)

    prune_in_jit(model)
    nmjax.check_sparse(nnx.state(model, nnx.Param), plan)


def test_other_parameters_share_the_rest():
    model = Network(nnx.Rngs(0))
    plan = plan_of(model)
    params = nnx.state(model, nnx.Param)
    sparsifier = nmjax.methods.one_shot(plan)
    state = sparsifier.init(params, jax.random.key(0))

    @nnx.jit
    def step(model, state):
        def loss_fn(model):
            params = nnx.state(model, nnx.Param)
            return loss_of(nmjax.nnx.with_params(model, sparsifier.apply(params, state)))

        return nnx.grad(loss_fn)(model)

    grads = step(model, state)
    assert int(model.dropout.rngs.count[...]) == 1
    # One-shot pruning has no gradient for pruned weights.
    kept = np.asarray(state.masks["head/kernel"])
    gradient = np.asarray(grads["head"]["kernel"][...])
    assert (gradient[kept] != 0).any()
    assert (gradient[~kept] == 0).all()


def test_what_does_not_fit():
    model, other = Network(nnx.Rngs(0)), Network(nnx.Rngs(0), width=8)
    plan = plan_of(model)
    with pytest.raises(ValueError, match="head/kernel: planned as"):
        nmjax.nnx.sparsify(other, plan)
    with pytest.raises(ValueError, match="head/kernel: planned as"):
        nmjax.nnx.prune(other, plan)
    with pytest.raises(ValueError, match=r"missing: \['head/bias"):
        nmjax.nnx.with_params(Network(nnx.Rngs(0)), nnx.state(model, nnx.BatchStat))
    for function in (nmjax.nnx.sparsify, nmjax.nnx.prune):
        with pytest.raises(TypeError, match="expected an NNX module, got State"):
            function(nnx.state(model, nnx.Param), plan)
    with pytest.raises(TypeError, match="expected a plan"):
        nmjax.nnx.sparsify(model, "2:4")


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="Flax has one mode only")
def test_modules_as_plain_trees():
    """Flax can also treat modules as trees of variables, without a graph."""
    with nnx.set_graph_mode(False):
        model = Network(nnx.Rngs(0))
        plan = plan_of(model)

        sparse = nmjax.nnx.sparsify(model, plan)
        assert sparse.norm.mean is model.norm.mean
        nmjax.nnx.prune(model, plan)
        packed = nmjax.nnx.pack(model, plan)
        np.testing.assert_allclose(nnx.jit(loss_of)(packed), loss_of(model), rtol=1e-5)
    assert packed.norm.mean is not model.norm.mean
