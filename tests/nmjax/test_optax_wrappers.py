"""Our transformations inside optax's wrappers: chain, masked, partition, MultiSteps and others."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.nmjax.optax_cases import (
    GRADS,
    OTHER_MASKS,
    PARAMS,
    PLAN,
    REAL_GRADS,
    REAL_PARAMS,
    apply,
    assert_changed,
    assert_trees_close,
    assert_trees_equal,
)


def test_chain(tx):
    chain = optax.chain(optax.scale(2.0), tx, optax.scale(-0.5))
    doubled = jax.tree.map(lambda g: 2 * g, GRADS)
    expected = jax.tree.map(lambda u: -0.5 * u, apply(tx, grads=doubled))
    assert_trees_close(apply(chain), expected)
    named = optax.named_chain(
        ("double", optax.scale(2.0)), ("own", tx), ("half", optax.scale(-0.5))
    )
    assert_trees_close(apply(named), expected)


ONLY_A = {
    "tree": {
        "a": {"kernel": True, "bias": True},
        "b": {"kernel": False},
        "phase": True,
        "temperature": False,
    },
    "prefix": {"a": True, "b": False, "phase": False, "temperature": True},
    "callable": lambda tree: jax.tree.map_with_path(lambda path, _: path[0].key == "a", tree),
    "callable prefix": lambda tree: {name: name == "a" for name in tree},
}


@pytest.mark.parametrize("kind", ONLY_A)
def test_masked(tx, kind):
    masked = optax.masked(tx, ONLY_A[kind])
    updates = jax.jit(lambda g: apply(masked, grads=g))(GRADS)
    np.testing.assert_allclose(updates["a"]["kernel"], apply(tx)["a"]["kernel"], rtol=1e-6)
    assert_trees_equal({**updates, "a": GRADS["a"]}, GRADS)


def test_masked_out_altogether(tx):
    assert_trees_equal(apply(optax.masked(tx, lambda tree: False)), GRADS)


@pytest.mark.parametrize("kind", ["tree", "callable"])
def test_partition(tx, kind):
    def labels(tree):
        return jax.tree.map_with_path(lambda p, _: "own" if p[0].key == "a" else "other", tree)

    other = {"own": tx, "other": optax.scale(-1.0)}
    partition = optax.partition(other, labels(PARAMS) if kind == "tree" else labels)
    updates = apply(partition, steps=2)
    assert_trees_equal(updates["a"], apply(tx, steps=2)["a"])
    np.testing.assert_array_equal(updates["b"]["kernel"], -GRADS["b"]["kernel"])


def test_the_same_twice_in_a_partition(row):
    """Two strengths for two groups of layers."""
    strengths = {"a": row.value, "b": 2 * row.value}
    partition = optax.partition(
        {name: row.make(PLAN, value) for name, value in strengths.items()},
        {"a": "a", "b": "b", "phase": "a", "temperature": "a"},
    )
    updates = apply(partition)
    for name, value in strengths.items():
        assert_trees_equal(updates[name], apply(row.make(PLAN, value))[name])


@pytest.mark.not_under("jax_numpy_dtype_promotion")
def test_multi_steps(tx):
    """Every second call steps, with the averaged gradient: the term once, not twice."""
    wrapped = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    state = wrapped.init(REAL_PARAMS)
    update = jax.jit(wrapped.update)
    third, average = (jax.tree.map(lambda g, c=c: c * g, REAL_GRADS) for c in (3, 2))
    for steps in (1, 2):
        updates, state = update(REAL_GRADS, state, REAL_PARAMS)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        updates, state = update(third, state, REAL_PARAMS)
        assert_trees_close(updates, apply(tx, REAL_PARAMS, average, steps), rtol=1e-5)


@pytest.mark.parametrize("scheduled", [False, True])
def test_inject_hyperparams(row, scheduled):
    value = (lambda count: row.value / jnp.float32(1 + count)) if scheduled else row.value
    injected = optax.inject_hyperparams(row.make)(PLAN, **{row.number: value})
    assert list(injected.init(REAL_PARAMS).hyperparams) == [row.number]  # and not the plan
    for steps in (1, 3):
        assert_trees_close(
            apply(injected, REAL_PARAMS, REAL_GRADS, steps),
            apply(row.make(PLAN, value), REAL_PARAMS, REAL_GRADS, steps),
        )


def test_inject_hyperparams_hands_over_the_very_plan(row):
    plans = []

    def factory(plan, number):
        plans.append(plan)
        return row.make(plan, number)

    apply(optax.inject_hyperparams(factory)(PLAN, row.value), REAL_PARAMS, REAL_GRADS)
    assert plans
    assert all(plan is PLAN for plan in plans)


def test_injected_number_changes_without_recompiling(row):
    tx = optax.inject_hyperparams(row.make)(PLAN, **{row.number: row.value})
    state = tx.init(REAL_PARAMS)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(state):
        return tx.update(REAL_GRADS, state, REAL_PARAMS)

    for value in (row.value, 0.5, -0.5):
        state.hyperparams[row.number] = jnp.asarray(value, jnp.float32)
        updates, state = update(state)
        assert_trees_close(updates, apply(row.make(PLAN, value), REAL_PARAMS, REAL_GRADS))


@pytest.mark.not_under("jax_debug_nans")
def test_apply_if_finite(tx):
    wrapped = optax.apply_if_finite(tx, max_consecutive_errors=3)
    bad = {**GRADS, "temperature": jnp.asarray(jnp.nan)}
    update = jax.jit(wrapped.update)
    state = wrapped.init(PARAMS)
    updates, state = update(bad, state, PARAMS)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert_trees_equal(state.inner_state, tx.init(PARAMS))
    updates, state = update(GRADS, state, PARAMS)
    assert_trees_close(updates, apply(tx))


def test_conditionally_transform(tx):
    wrapped = optax.conditionally_transform(tx, lambda step: step >= 1)
    assert_trees_equal(apply(wrapped), GRADS)
    assert_trees_close(apply(wrapped, steps=2), apply(tx))
    masking = optax.conditionally_mask(tx, lambda step: step >= 1)
    assert not any(np.any(u) for u in jax.tree.leaves(apply(masking)))
    assert_trees_close(apply(masking, steps=3), apply(tx, steps=2))


@pytest.mark.skipif(not hasattr(optax, "selective_transform"), reason="not in this optax yet")
def test_selective_transform(tx):
    wrapped = optax.selective_transform(
        tx, freeze_mask={"a": {"kernel": False, "bias": False}, "b": {"kernel": True}}
    )
    updates = apply(wrapped, REAL_PARAMS, REAL_GRADS)
    assert_trees_equal(updates["a"], apply(tx)["a"])
    assert not np.any(updates["b"]["kernel"])


def test_flatten_is_refused(tx):
    """`optax.flatten` hides every shape: better an error than no effect."""
    flat = optax.flatten(tx)
    with pytest.raises(ValueError, match="not flattened") as error:
        flat.update(REAL_GRADS, flat.init(REAL_PARAMS), REAL_PARAMS)
    assert "a/kernel: planned as (16, 4), not in the tree" in str(error.value)
    assert "b/kernel: planned as (8, 8), not in the tree" in str(error.value)


# The extra argument masks=


WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": True}),
    "partition": lambda tx: optax.partition({"own": tx}, {"a": "own", "b": "own"}),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: True),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda tx: tx, "tx")(tx),
}


PROMOTES = pytest.mark.not_under("jax_numpy_dtype_promotion")  # optax's MultiSteps does.


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=PROMOTES if n == "MultiSteps" else []) for n in WRAPPERS]
)
def test_masks_reach_the_transformation(tx, name):
    wrapped = WRAPPERS[name](tx)
    through = jax.jit(lambda masks: apply(wrapped, REAL_PARAMS, REAL_GRADS, masks=masks))
    direct = apply(tx, REAL_PARAMS, REAL_GRADS, masks=OTHER_MASKS)
    assert_trees_close(through(OTHER_MASKS), direct, rtol=1e-5)
    assert_changed(direct, apply(tx, REAL_PARAMS, REAL_GRADS))  # so that lost masks would show


def test_masks_of_hidden_leaves_may_be_passed(tx):
    masked = optax.masked(tx, ONLY_A["prefix"])
    updates = apply(masked, masks=OTHER_MASKS)
    assert_trees_equal(updates["a"], apply(tx, masks=OTHER_MASKS)["a"])
    only = apply(masked, masks={"a/kernel": OTHER_MASKS["a/kernel"]})
    assert_trees_equal(only, updates)
