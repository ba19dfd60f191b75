"""What optax expects of a transformation that needs parameters, for each of ours."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.nmjax.optax_cases import (
    GRADS,
    PARAMS,
    PLAN,
    TRANSFORMATIONS,
    apply,
    assert_changed,
    assert_trees_close,
    assert_trees_equal,
    make_params,
    types,
)


def test_is_a_transformation_with_extra_args(tx):
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert_changed(apply(tx))


def test_unknown_extra_args_are_ignored(tx):
    assert_trees_equal(apply(tx, value=1.0, grad=None, nobody_knows="this"), apply(tx))


def test_missing_params_raise_the_message_of_optax(tx):
    reference = optax.scale_by_trust_ratio()
    with pytest.raises(ValueError, match="params") as expected:
        reference.update(GRADS, reference.init(PARAMS), None)
    with pytest.raises(ValueError, match=re.escape(str(expected.value))):
        tx.update(GRADS, tx.init(PARAMS))
    with pytest.raises(ValueError, match=re.escape(str(expected.value))):
        tx.update(GRADS, tx.init(PARAMS), None)


def test_leaves_outside_the_plan_are_untouched(tx):
    updates = apply(tx)
    assert updates["phase"] is GRADS["phase"]
    assert updates["temperature"] is GRADS["temperature"]
    assert updates["a"]["bias"] is GRADS["a"]["bias"]


def test_input_is_not_modified(tx):
    grads = jax.tree.map(np.array, GRADS)
    params = jax.tree.map(np.array, PARAMS)
    state = tx.init(params)
    before = jax.tree.map(np.copy, (grads, params, state))
    tx.update(grads, state, params)
    assert_trees_equal((grads, params, state), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_updates_have_the_dtype_of_the_parameters(tx, dtype):
    params, grads = make_params(dtype), make_params(dtype)
    updates = apply(tx, params, grads)
    assert types(updates) == types(params)
    assert_changed(updates, grads)


def test_float64():
    with jax.enable_x64(True):
        params = make_params("float64")
        for row in TRANSFORMATIONS.values():
            updates = apply(row.make(PLAN, row.value), params, params)
            assert updates["a"]["kernel"].dtype == jnp.float64


def test_none_updates_stay_none(tx):
    grads = {**GRADS, "a": {"kernel": None, "bias": None}}
    updates = apply(tx, grads=grads)
    assert updates["a"] == {"kernel": None, "bias": None}
    np.testing.assert_array_equal(updates["b"]["kernel"], apply(tx)["b"]["kernel"])
    whole_branch = apply(tx, grads={**GRADS, "a": None})
    assert whole_branch["a"] is None


def test_schedule_and_number_agree(row):
    number = row.make(PLAN, row.value)
    schedule = row.make(PLAN, optax.constant_schedule(row.value))
    for steps in (1, 3):
        assert_trees_equal(apply(number, steps=steps), apply(schedule, steps=steps))


def test_schedule_counts_updates_from_zero(row):
    values = [0.1, 0.2, 0.4]
    schedule = row.make(PLAN, lambda count: jnp.asarray(values)[count])
    for steps, value in enumerate(values, start=1):
        assert_trees_close(apply(schedule, steps=steps), apply(row.make(PLAN, value)))


# State


def test_state_is_a_named_tuple_of_arrays(tx):
    state = tx.init(PARAMS)
    assert hasattr(state, "_fields")
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_init_from_shapes(tx):
    shapes = jax.eval_shape(lambda: PARAMS)
    assert_trees_equal(tx.init(shapes), tx.init(PARAMS))
    abstract = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(abstract) == jax.tree.structure(tx.init(PARAMS))
    updates, state = jax.eval_shape(tx.update, shapes, abstract, shapes)
    assert types(updates) == types(shapes)
    assert types(state) == types(abstract)


def test_state_keeps_its_types(tx):
    state = tx.init(PARAMS)
    _, after = tx.update(GRADS, state, PARAMS)
    assert types(after) == types(state)
    _, after = jax.jit(tx.update)(GRADS, state, PARAMS)
    assert types(after) == types(state)


def test_branches_of_a_condition(tx):
    """Both branches must have one type: new state and old, updates and gradients."""

    @jax.jit
    def maybe(condition, state):
        return jax.lax.cond(
            condition, lambda: tx.update(GRADS, state, PARAMS), lambda: (GRADS, state)
        )

    state = tx.init(PARAMS)
    assert_trees_close(maybe(True, state), tx.update(GRADS, state, PARAMS))
    assert_trees_equal(maybe(False, state), (GRADS, state))


def test_scan_is_a_loop(tx):
    def body(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    carry = (PARAMS, tx.init(PARAMS))
    several = jax.tree.map(lambda g: jnp.stack([g, 0.5 * g, -g]), GRADS)
    together, _ = jax.lax.scan(body, carry, several)
    for i in range(3):
        carry, _ = body(carry, jax.tree.map(lambda g, i=i: g[i], several))
    assert_trees_close(together, carry, rtol=1e-5)


def test_jit_changes_nothing(tx):
    assert_trees_equal(jax.jit(tx.init)(PARAMS), tx.init(PARAMS))
    state = tx.init(PARAMS)
    assert_trees_close(jax.jit(tx.update)(GRADS, state, PARAMS), tx.update(GRADS, state, PARAMS))


def test_many_steps_compile_once(tx):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for scale in range(5):
        params, state = step(params, state, jax.tree.map(lambda g, s=scale: s * g, GRADS))


def test_seeds_under_vmap(tx):
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), PARAMS)
    grads = jax.tree.map(lambda x: jnp.stack([x, x + 1, x]), GRADS)
    states = jax.vmap(tx.init)(params)
    updates, _ = jax.vmap(tx.update)(grads, states, params)
    for i in range(3):
        alone = apply(tx, *(jax.tree.map(lambda x, i=i: x[i], tree) for tree in (params, grads)))
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], updates), alone)


@pytest.mark.not_under("jax_numpy_dtype_promotion")
def test_tree_map_params_finds_no_parameters_in_the_state(tx):
    chain = optax.chain(tx, optax.scale_by_adam())
    state = chain.init(PARAMS)
    assert_trees_equal(optax.tree_map_params(chain, lambda x: x, state), state)
    zeroed = optax.tree_map_params(chain, jnp.zeros_like, chain.update(GRADS, state, PARAMS)[1])
    own, adam = zeroed
    assert_trees_equal(own, tx.update(GRADS, tx.init(PARAMS), PARAMS)[1])
    assert not any(np.any(x) for x in jax.tree.leaves((adam.mu, adam.nu)))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shardings_are_kept(tx, axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))

    def place(tree):
        specs = {"a": ("x", "y"), "b": (None, "x"), "bias": ("y",)}
        tree = dict(tree, a=dict(tree["a"]), b=dict(tree["b"]))
        for name in "ab":
            sharding = NamedSharding(mesh, PartitionSpec(*specs[name]))
            tree[name]["kernel"] = jax.device_put(tree[name]["kernel"], sharding)
        tree["a"]["bias"] = jax.device_put(
            tree["a"]["bias"], NamedSharding(mesh, PartitionSpec("y"))
        )
        rest = NamedSharding(mesh, PartitionSpec())
        return {**tree, **jax.device_put({k: tree[k] for k in ("phase", "temperature")}, rest)}

    with jax.set_mesh(mesh):
        params, grads = place(PARAMS), place(GRADS)
        state = jax.jit(tx.init)(params)
        updates, after = jax.jit(tx.update)(grads, state, params)
        assert types(updates) == types(params)
        assert types(after) == types(state)
        for got, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert got.sharding.is_equivalent_to(expected.sharding, got.ndim)
    assert_trees_close(updates, apply(tx))
