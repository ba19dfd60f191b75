"""Whole training steps on eight simulated devices, and what XLA makes of them.

Sparsity may not cost communication: the compiled step holds the collectives of the dense step and
no others. Nor may it work out a mask twice: the forward pass and the optimizer share one.
"""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax

DEVICES = 8
STEPS = 3
LAMBDA = 0.3

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "a": {"kernel": 0.2 * normal(64, 32), "bias": 0.1 * normal(32)},
    "b": {"kernel": 0.2 * normal(32, 16)},
}
BATCH = normal(32, 64), normal(32, 16)
PLAN = nmjax.make_plan(PARAMS, "2:4")

# How parameters lie on the mesh. Shards of a reduction axis hold 8 or 4 weights: whole groups.
LAYOUTS = {
    "data parallel": {"a": {"kernel": P(), "bias": P()}, "b": {"kernel": P()}},
    "sharded inputs": {"a": {"kernel": P("d"), "bias": P("d")}, "b": {"kernel": P("d")}},
    "sharded outputs": {
        "a": {"kernel": P(None, "d"), "bias": P("d")},
        "b": {"kernel": P(None, "d")},
    },
}


def make_mesh(axis_type):
    return jax.make_mesh((DEVICES,), ("d",), axis_types=(axis_type,))


def place(tree, specs, mesh):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def make_step(plan, *, sparse, explicit=False):
    """A training step, SR-STE or dense; parameters are gathered for use, as FSDP does."""

    def gathered(w):
        return jax.sharding.reshard(w, P()) if explicit else w

    def loss(params, batch):
        x, y = batch
        if sparse:
            params = nmjax.sparsify(params, plan)
        params = jax.tree.map(gathered, params)
        hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
        return jnp.mean((hidden @ params["b"]["kernel"] - y) ** 2)

    pull = [nmjax.add_sparse_refined(plan, LAMBDA)] if sparse else []
    tx = optax.chain(*pull, optax.sgd(0.1, momentum=0.9))

    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step), tx


def train(step, tx, params, batch):
    state = jax.jit(tx.init)(params)
    for _ in range(STEPS):
        params, state = step(params, state, batch)
    return params


def collectives(step, tx, params, batch):
    """Kinds of communication in the compiled step, and how many of each."""
    text = step.lower(params, jax.jit(tx.init)(params), batch).compile().as_text()
    return Counter(
        re.findall(
            r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\(", text
        )
    )


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def axis_type(request):
    return request.param


@functools.cache
def trained_on_one():
    return train(*make_step(PLAN, sparse=True), PARAMS, BATCH)


@functools.cache
def trained_on_eight(axis_type, layout):
    """Parameters before and after training, and their masks then."""
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        params = place(PARAMS, LAYOUTS[layout], mesh)
        batch = place(BATCH, (P("d"), P("d")), mesh)
        step, tx = make_step(PLAN, sparse=True, explicit=axis_type == AxisType.Explicit)
        after = train(step, tx, params, batch)
        return params, after, jax.jit(nmjax.compute_masks)(after, PLAN)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_devices_train_as_one(axis_type, layout):
    single, (_, sharded, masks) = trained_on_one(), trained_on_eight(axis_type, layout)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), sharded, single)
    expected = nmjax.compute_masks(single, PLAN)
    assert masks.keys() == expected.keys()
    assert nmjax.total_sad(jax.device_get(masks), jax.device_get(expected)) == 0
    before = nmjax.compute_masks(PARAMS, PLAN)
    assert nmjax.total_sad(before, expected) > 0  # the masks moved, so equal ones say something


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shardings_are_kept(axis_type, layout):
    params, after, masks = trained_on_eight(axis_type, layout)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)
    for name, mask in masks.items():
        kernel = after[name[0]]["kernel"]
        assert mask.sharding.is_equivalent_to(kernel.sharding, kernel.ndim), name


@pytest.mark.optimized
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_collectives_but_those_of_the_dense_step(axis_type, layout):
    mesh = make_mesh(axis_type)
    explicit = axis_type == AxisType.Explicit
    with jax.set_mesh(mesh):
        params = place(PARAMS, LAYOUTS[layout], mesh)
        batch = place(BATCH, (P("d"), P("d")), mesh)
        dense = collectives(*make_step(PLAN, sparse=False, explicit=explicit), params, batch)
        sparse = collectives(*make_step(PLAN, sparse=True, explicit=explicit), params, batch)
    assert dense.total() > 0  # gradients are averaged over the devices
    assert sparse == dense


@pytest.mark.optimized
def test_shards_that_cut_groups_do_communicate():
    """The control: with 6 weights a shard and groups of 4, the count above must go up."""
    params = {"a": {"kernel": normal(48, 32), "bias": normal(32)}, "b": {"kernel": normal(32, 16)}}
    plan = nmjax.make_plan(params, "2:4")
    mesh = make_mesh(AxisType.Auto)
    with jax.set_mesh(mesh):
        params = place(params, LAYOUTS["sharded inputs"], mesh)
        batch = place((normal(32, 48), BATCH[1]), (P("d"), P("d")), mesh)
        dense = collectives(*make_step(plan, sparse=False), params, batch)
        sparse = collectives(*make_step(plan, sparse=True), params, batch)
    assert sparse.total() > dense.total()


def test_the_term_is_added_once_however_many_devices():
    """The pull of one step on weights without gradient: lambda W, not eight times that."""
    mesh = make_mesh(AxisType.Auto)
    with jax.set_mesh(mesh):
        params = place(PARAMS, LAYOUTS["data parallel"], mesh)
        zeros = jax.tree.map(jnp.zeros_like, place(BATCH, (P("d"), P("d")), mesh))
        step, tx = make_step(PLAN, sparse=True)
        # Without inputs or bias nothing but the pull moves the first kernel.
        params["a"]["bias"] = jnp.zeros_like(params["a"]["bias"])
        after, _ = step(params, jax.jit(tx.init)(params), zeros)
    w, mask = PARAMS["a"]["kernel"], nmjax.compute_masks(PARAMS, PLAN)["a/kernel"]
    np.testing.assert_allclose(
        after["a"]["kernel"], w - 0.1 * LAMBDA * jnp.where(mask, 0, w), rtol=1e-5
    )


@pytest.mark.parametrize("layout", ["data parallel", "sharded inputs"])
def test_replicas_that_average_their_gradients(layout):
    """`shard_map`: each device its own gradient, the mean of all, and then the optimizer."""
    mesh = make_mesh(AxisType.Auto)
    specs = LAYOUTS[layout]
    tx = optax.chain(nmjax.add_sparse_refined(PLAN, LAMBDA), optax.sgd(0.1, momentum=0.9))

    def loss(params, batch):
        sparse = nmjax.sparsify(params, PLAN)
        hidden = jnp.tanh(batch[0] @ sparse["a"]["kernel"] + sparse["a"]["bias"][None])
        return jnp.mean((hidden @ sparse["b"]["kernel"] - batch[1]) ** 2)

    def gradient(params, batch):
        return jax.tree.map(lambda g: jax.lax.pmean(g, "d"), jax.grad(loss)(params, batch))

    replicated = jax.shard_map(
        gradient, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), check_vma=False
    )

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(replicated(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params = place(PARAMS, specs, mesh)
    after = train(step, tx, params, place(BATCH, (P("d"), P("d")), mesh))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), after, trained_on_one())


# One mask computation a step


def marked_magnitude(w):
    """Magnitude, times a constant that nothing else in a step multiplies by."""
    return 1.2345678 * jnp.abs(w)


def mask_computations(pattern, optimizer, *, pull_in=None, shared=True):
    """How many times the marked score is worked out in the compiled training step.

    XLA repeats cheap operations in every fusion that reads their result. The optimized program
    writes every fusion out, so that each repetition shows as one more constant.

    Args:
      pattern: of both layers.
      optimizer: follows the sparse-refined term.
      pull_in: None for STE; "loss" or "optimizer" for SR-STE.
      shared: whether the optimizer is given the weights that the forward pass is given.
    """
    plan = nmjax.make_plan(PARAMS, pattern, score=marked_magnitude)
    strength = LAMBDA if pull_in == "loss" else None
    pull = [nmjax.add_sparse_refined(plan, LAMBDA)] if pull_in == "optimizer" else []
    tx = optax.chain(*pull, *optimizer)

    def loss(params):
        params = nmjax.sparsify(params, plan, lambda_w=strength)
        hidden = jnp.tanh(BATCH[0] @ params["a"]["kernel"] + params["a"]["bias"][None])
        return jnp.mean((hidden @ params["b"]["kernel"] - BATCH[1]) ** 2)

    def step(params, others, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params if shared else others)
        return optax.apply_updates(params, updates), state

    text = jax.jit(step).lower(PARAMS, PARAMS, tx.init(PARAMS)).compile().as_text()
    return len(re.findall(r"constant\(1\.23456\d*\)", text))


OPTIMIZERS = {
    "momentum": [optax.sgd(0.1, momentum=0.9)],
    "adamw": [optax.adamw(1e-3)],
    "clip, adamw": [optax.clip_by_global_norm(1.0), optax.adamw(1e-3)],
}
# optax's Adam mixes floats with integers.
PROMOTES = pytest.mark.not_under("jax_numpy_dtype_promotion")


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("pattern", "optimizer"),
    [
        ("2:4", "momentum"),
        pytest.param("2:4", "adamw", marks=PROMOTES),
        pytest.param("2:4", "clip, adamw", marks=PROMOTES),
        ("1:16", "momentum"),
    ],
)
def test_forward_and_optimizer_share_one_mask(pattern, optimizer):
    optimizer = OPTIMIZERS[optimizer]
    ste = mask_computations(pattern, optimizer)
    assert ste >= len(PLAN)
    assert mask_computations(pattern, optimizer, pull_in="optimizer") == ste
    assert mask_computations(pattern, optimizer, pull_in="loss") == ste


@pytest.mark.optimized
def test_masks_of_other_weights_are_not_shared():
    """The control: an optimizer with weights of its own must work their masks out."""
    optimizer = OPTIMIZERS["momentum"]
    shared = mask_computations("2:4", optimizer, pull_in="optimizer")
    assert mask_computations("2:4", optimizer, pull_in="optimizer", shared=False) >= 2 * shared
