"""Twenty steps of sparse training in three forms: in the loss, in the optimizer, and in NumPy.

The NumPy form knows nothing of nmjax or optax: its masks come from sorting, its gradients are
derived by hand, its optimizers are the textbook ones. It runs in float64, and so does JAX then.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax

STEPS = 20
LAMBDA = 0.3  # large enough that a wrong or a missing term shows within twenty steps
RATE = 0.05

RNG = np.random.default_rng(3)
X = RNG.normal(size=(32, 16))
Y = RNG.normal(size=(32, 3))
PARAMS = {
    "a": {"kernel": 0.4 * RNG.normal(size=(16, 12)), "bias": 0.1 * RNG.normal(size=12)},
    "b": {"kernel": 0.4 * RNG.normal(size=(12, 3))},
}
PLAN = nmjax.make_plan(PARAMS, "2:4")


# NumPy


def numpy_mask(w, n=2, m=4):
    """Groups of m along the rows' axis; the n largest magnitudes of each stay."""
    groups = np.abs(w.T.reshape(-1, m))
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, np.argsort(-groups, axis=1, kind="stable")[:, :n], True, axis=1)
    return mask.reshape(w.T.shape).T


def numpy_gradient(p, lambda_w):
    """SR-STE's gradient of half the mean squared error: g(sparse W) + lambda (1 - mask) W."""
    mask_a, mask_b = numpy_mask(p["a/kernel"]), numpy_mask(p["b/kernel"])
    a, b = p["a/kernel"] * mask_a, p["b/kernel"] * mask_b
    hidden = np.tanh(X @ a + p["a/bias"])
    d_out = (hidden @ b - Y) / Y.size
    d_hidden = (d_out @ b.T) * (1 - hidden**2)
    return {
        "a/kernel": X.T @ d_hidden + lambda_w * (1 - mask_a) * p["a/kernel"],
        "a/bias": d_hidden.sum(axis=0),
        "b/kernel": hidden.T @ d_out + lambda_w * (1 - mask_b) * p["b/kernel"],
    }


def numpy_clip(grads, limit):
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    return {name: g * min(1.0, limit / norm) for name, g in grads.items()}


def numpy_momentum(w, g, memory, t):
    memory["v"] = 0.9 * memory.get("v", 0) + g
    return w - RATE * memory["v"]


def numpy_momentum_with_decay(w, g, memory, t):
    return numpy_momentum(w, g + 1e-2 * w, memory, t)


def numpy_adamw(w, g, memory, t):
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
    m, v = memory["m"] / (1 - 0.9**t), memory["v"] / (1 - 0.999**t)
    return w - RATE * (m / (np.sqrt(v) + 1e-8) + 1e-2 * w)


def numpy_train(step, clip, lambda_w):
    p = {"a/kernel": PARAMS["a"]["kernel"], "a/bias": PARAMS["a"]["bias"]}
    p["b/kernel"] = PARAMS["b"]["kernel"]
    memories = {name: {} for name in p}
    for t in range(1, STEPS + 1):
        grads = numpy_gradient(p, lambda_w)
        if clip is not None:
            grads = numpy_clip(grads, clip)
        p = {name: step(p[name], grads[name], memories[name], t) for name in p}
    return {"a": {"kernel": p["a/kernel"], "bias": p["a/bias"]}, "b": {"kernel": p["b/kernel"]}}


# JAX


def loss_fn(params, lambda_w=None):
    sparse = nmjax.sparsify(params, PLAN, lambda_w=lambda_w)
    x, y = (jnp.asarray(data, sparse["a"]["kernel"].dtype) for data in (X, Y))
    hidden = jnp.tanh(x @ sparse["a"]["kernel"] + sparse["a"]["bias"][None])
    return 0.5 * jnp.mean((hidden @ sparse["b"]["kernel"] - y) ** 2)


def jax_train(tx, lambda_w=None, params=PARAMS):
    """Twenty steps; `lambda_w` may be None, a number, or a schedule for the term in the loss."""

    def step(carry, count):
        params, state = carry
        strength = lambda_w(count) if callable(lambda_w) else lambda_w
        updates, state = tx.update(jax.grad(loss_fn)(params, strength), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.asarray, params)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(STEPS))[0][0])(
        (params, tx.init(params))
    )


# optax transformations, the NumPy step they amount to, and the norm that they clip to.
OPTIMIZERS = {
    "momentum": ([optax.sgd(RATE, momentum=0.9)], numpy_momentum, None),
    "momentum, decay": (
        [optax.add_decayed_weights(1e-2), optax.sgd(RATE, momentum=0.9)],
        numpy_momentum_with_decay,
        None,
    ),
    "adamw": ([optax.adamw(RATE, weight_decay=1e-2)], numpy_adamw, None),
    "clip, momentum": (
        [optax.clip_by_global_norm(0.2), optax.sgd(RATE, momentum=0.9)],
        numpy_momentum,
        0.2,
    ),
    "clip, adamw": (
        [optax.clip_by_global_norm(0.2), optax.adamw(RATE, weight_decay=1e-2)],
        numpy_adamw,
        0.2,
    ),
}


# optax's Adam mixes floats with integers.
PROMOTES = pytest.mark.not_under("jax_numpy_dtype_promotion")
ADAM = pytest.param("clip, adamw", marks=PROMOTES)


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


@pytest.mark.parametrize(
    ("name", "lambda_w"),
    [
        *(
            pytest.param(name, LAMBDA, marks=PROMOTES if "adamw" in name else [])
            for name in OPTIMIZERS
        ),
        ("momentum", 0.0),
        pytest.param("clip, adamw", -LAMBDA, marks=PROMOTES),
    ],
)
def test_loss_optimizer_and_numpy_agree(name, lambda_w):
    transformations, numpy_step, clip = OPTIMIZERS[name]
    expected = numpy_train(numpy_step, clip, lambda_w)
    with jax.enable_x64(True):
        in_loss = jax_train(optax.chain(*transformations), lambda_w)
        pull = nmjax.add_sparse_refined(PLAN, lambda_w)
        in_optimizer = jax_train(optax.chain(pull, *transformations))
        assert in_loss["a"]["kernel"].dtype == np.float64
        assert largest_difference(in_loss, expected) < 1e-12
        assert largest_difference(in_optimizer, expected) < 1e-12


@pytest.mark.parametrize("name", ["momentum, decay", ADAM])
def test_loss_and_optimizer_agree_in_float32(name):
    transformations, _, _ = OPTIMIZERS[name]
    params = jax.tree.map(np.float32, PARAMS)
    in_loss = jax_train(optax.chain(*transformations), LAMBDA, params)
    pull = nmjax.add_sparse_refined(PLAN, LAMBDA)
    in_optimizer = jax_train(optax.chain(pull, *transformations), params=params)
    assert in_loss["a"]["kernel"].dtype == np.float32
    assert largest_difference(in_loss, in_optimizer) < 1e-5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_comparison_would_notice(name):
    """The term matters, the masks move, and the norm is clipped, within these twenty steps."""
    _, numpy_step, clip = OPTIMIZERS[name]
    trained = numpy_train(numpy_step, clip, LAMBDA)
    assert largest_difference(trained, numpy_train(numpy_step, clip, 0.0)) > 1e-2
    before, after = nmjax.compute_masks(PARAMS, PLAN), nmjax.compute_masks(trained, PLAN)
    assert nmjax.total_sad(before, after) > 0
    if clip is not None:
        assert largest_difference(trained, numpy_train(numpy_step, None, LAMBDA)) > 1e-2


def test_schedules_agree():
    schedule = optax.linear_schedule(0.0, LAMBDA, STEPS)
    sgd = optax.sgd(RATE, momentum=0.9)
    in_loss = jax_train(sgd, schedule)
    in_optimizer = jax_train(optax.chain(nmjax.add_sparse_refined(PLAN, schedule), sgd))
    assert largest_difference(in_loss, in_optimizer) < 1e-5
    assert largest_difference(in_loss, jax_train(sgd, LAMBDA)) > 1e-2


def test_clipping_before_the_term_leaves_the_pull_unclipped():
    """The other legal order: the pull added to the clipped gradient, as Hu et al. (2024) do."""
    params = jax.tree.map(jnp.float32, PARAMS)
    grads = jax.jit(jax.grad(loss_fn))(params)
    limit = 0.01
    tx = optax.chain(optax.clip_by_global_norm(limit), nmjax.add_sparse_refined(PLAN, LAMBDA))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    clipped = numpy_clip(
        {"a": grads["a"]["kernel"], "b": grads["b"]["kernel"], "bias": grads["a"]["bias"]}, limit
    )
    for layer in "ab":
        w = PARAMS[layer]["kernel"]
        expected = clipped[layer] + LAMBDA * (1 - numpy_mask(w)) * w
        np.testing.assert_allclose(updates[layer]["kernel"], expected, rtol=1e-4, atol=1e-6)


def test_gradients_averaged_over_replicas_hold_the_term_once():
    """Replicas that add the term in the loss and average agree with the optimizer's single term."""
    params = jax.tree.map(jnp.float32, PARAMS)
    batches = X.reshape(4, 8, 16), Y.reshape(4, 8, 3)

    def loss(params, x, y, lambda_w):
        sparse = nmjax.sparsify(params, PLAN, lambda_w=lambda_w)
        hidden = jnp.tanh(x @ sparse["a"]["kernel"] + sparse["a"]["bias"][None])
        return 0.5 * jnp.mean((hidden @ sparse["b"]["kernel"] - y) ** 2)

    def averaged(lambda_w):
        grad = jax.grad(lambda p, x, y: loss(p, x, y, lambda_w))
        grads = jax.vmap(grad, in_axes=(None, 0, 0))(params, *batches)
        return jax.tree.map(lambda g: g.mean(axis=0), grads)

    tx = nmjax.add_sparse_refined(PLAN, LAMBDA)
    once, _ = tx.update(averaged(None), tx.init(params), params)
    assert largest_difference(averaged(LAMBDA), once) < 1e-6
