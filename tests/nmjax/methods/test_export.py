"""What methods export after training is what was trained, and packing anything else is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (64, 16))
# Inputs count less and less, so that training changes which weights are large.
TARGETS = X * jnp.linspace(1, 0, 16)[None] @ jax.random.normal(jax.random.key(1), (16, 8))
STEPS, PER_EPOCH = 60, 10


def init():
    return {"kernel": jax.random.normal(KEY, (16, 8)) * 0.3}


def subp(plan):
    return nmjax.soft_uniform_blocks(plan, nmjax.cubic_ramp(0, STEPS - PER_EPOCH))


def pulled(plan):
    return nmjax.add_sparse_refined(plan, 0.01)


METHODS = {
    "ste": ("2:4", nmjax.straight_through, lambda plan: optax.identity()),
    "sr_ste": ("2:4", nmjax.straight_through, pulled),
    "one_shot": ("2:4", nmjax.one_shot, lambda plan: optax.identity()),
    "subp": ("1x4@0.75", subp, lambda plan: optax.identity()),
}


def rank_signed(w):
    """Ranks zeros above negative weights."""
    return w


def train(params, sparsifier, tx):
    state, opt_state = sparsifier.init(params, KEY), tx.init(params)

    def loss_fn(params, state):
        return jnp.mean((X @ sparsifier.apply(params, state)["kernel"] - TARGETS) ** 2)

    @jax.jit
    def step(params, state, opt_state):
        grads, masks = jax.grad(loss_fn)(params, state), getattr(state, "masks", None)
        updates, opt_state = tx.update(grads, opt_state, params, masks=masks)
        return optax.apply_updates(params, updates), opt_state

    for count in range(STEPS):
        if count % PER_EPOCH == 0:
            state = sparsifier.refresh(state, params, count)
        params, opt_state = step(params, state, opt_state)
    return params, state


@pytest.mark.parametrize(
    ("method", "score"),
    [
        *((name, nmjax.magnitude) for name in METHODS),
        ("ste", rank_signed),
        ("one_shot", rank_signed),
    ],
)
def test_what_was_trained_is_exported(method, score):
    pattern, make, transformation = METHODS[method]
    params = init()
    plan = nmjax.make_plan(params, pattern, score=score)
    sparsifier = make(plan)
    tx = optax.chain(transformation(plan), optax.sgd(0.05, momentum=0.9))
    params, state = train(params, sparsifier, tx)
    trained = sparsifier.apply(params, state)["kernel"]
    packed = nmjax.pack(sparsifier.export(params, state), plan)
    np.testing.assert_array_equal(nmjax.unpack(packed)["kernel"], trained)

    with pytest.raises(ValueError, match=r"sparsifier\.export"):
        nmjax.pack(params, plan)
    # Masks made from the dense weights would ship another network.
    other = nmjax.prune(params, plan)["kernel"]
    remembers = method in ("one_shot", "subp")
    assert remembers == (not np.allclose(X @ other, X @ trained, rtol=1e-2, atol=1e-2))


@pytest.mark.parametrize(
    ("pattern", "make"),
    [("2:4", lambda plan: nmjax.one_shot(plan, at_step=30)), ("1x4@0.75", subp)],
)
def test_unfinished_training_is_not_exported(pattern, make):
    params = init()
    sparsifier = make(nmjax.make_plan(params, pattern))
    state = sparsifier.refresh(sparsifier.init(params, KEY), params, PER_EPOCH)
    with pytest.raises(ValueError, match=r"(?s)refresh at or after.*\n  kernel \(16, 8\)"):
        sparsifier.export(params, state)


def test_given_masks_that_keep_too_much_are_not_exported():
    params = init()
    plan = nmjax.make_plan(params, "2:4")
    sparsifier = nmjax.one_shot(plan, masks={"kernel": jnp.ones((16, 8), bool)})
    with pytest.raises(ValueError, match=r"(?s)masks= keep more.*\n  kernel \(16, 8\): 32 of 32"):
        sparsifier.export(params, sparsifier.init(params, KEY))


def test_export_runs_outside_jit():
    params = init()
    sparsifier = nmjax.one_shot(nmjax.make_plan(params, "2:4"))
    with pytest.raises(TypeError, match=r"unknown inside jax\.jit"):
        jax.jit(sparsifier.export)(params, sparsifier.init(params, KEY))
