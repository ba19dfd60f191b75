"""What optax expects of a transformation that needs parameters, for each of ours.

A new transformation joins by one row in `TRANSFORMATIONS`.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax


class Row(NamedTuple):
    """A transformation of a plan and one number that may be a schedule."""

    make: Callable[..., optax.GradientTransformationExtraArgs]
    number: str  # the argument's name
    value: float


TRANSFORMATIONS = {
    "add_sparse_refined": Row(nmjax.add_sparse_refined, "lambda_w", 0.3),
}

RNG = np.random.default_rng(0)


def make_params(dtype="float32"):
    """Two planned leaves, and 1-D, complex and scalar leaves that are not."""

    def normal(*shape):
        return jnp.asarray(RNG.normal(size=shape), dtype)

    return {
        "a": {"kernel": normal(16, 4), "bias": normal(4)},
        "b": {"kernel": normal(8, 8)},
        "phase": jnp.asarray(RNG.normal(size=3) + 1j * RNG.normal(size=3), "complex64"),
        "temperature": normal(),
    }


PARAMS = make_params()
GRADS = make_params()
# Without the complex leaf, for wrappers of optax that cast every leaf to one real dtype.
REAL_PARAMS, REAL_GRADS = ({k: tree[k] for k in ("a", "b")} for tree in (PARAMS, GRADS))
PLAN = nmjax.make_plan(PARAMS, "2:4")
OTHER_MASKS = {name: ~mask for name, mask in nmjax.compute_masks(PARAMS, PLAN).items()}


@pytest.fixture(params=TRANSFORMATIONS)
def row(request):
    return TRANSFORMATIONS[request.param]


@pytest.fixture(params=["number", "schedule"])
def tx(request, row):
    value = row.value
    return row.make(PLAN, value if request.param == "number" else lambda count: value / (1 + count))


def apply(tx, params=PARAMS, grads=GRADS, steps=1, **extra_args):
    """The updates of the last of `steps` steps with the same parameters and gradients."""
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params, **extra_args)
    return updates


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b, rtol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), a, b)


def types(tree):
    """Shapes, dtypes, weak types and shardings."""
    return jax.tree.map(lambda x: (jax.typeof(x), x.weak_type), tree)


def assert_changed(updates, grads=GRADS, leaves=("a", "b")):
    for leaf in leaves:
        assert not np.array_equal(updates[leaf]["kernel"], grads[leaf]["kernel"])


# The contract


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
    traces = 0

    @jax.jit
    def step(params, state, grads):
        nonlocal traces
        traces += 1
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for scale in range(5):
        params, state = step(params, state, jax.tree.map(lambda g, s=scale: s * g, GRADS))
    assert traces == 1


def test_seeds_under_vmap(tx):
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), PARAMS)
    grads = jax.tree.map(lambda x: jnp.stack([x, x + 1, x]), GRADS)
    states = jax.vmap(tx.init)(params)
    updates, _ = jax.vmap(tx.update)(grads, states, params)
    for i in range(3):
        alone = apply(tx, *(jax.tree.map(lambda x, i=i: x[i], tree) for tree in (params, grads)))
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], updates), alone)


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


# Wrappers


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
    value = (lambda count: row.value / (1 + count)) if scheduled else row.value
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
    traces = 0

    @jax.jit
    def update(state):
        nonlocal traces
        traces += 1
        return tx.update(REAL_GRADS, state, REAL_PARAMS)

    for value in (row.value, 0.5, -0.5):
        state.hyperparams[row.number] = jnp.asarray(value, jnp.float32)
        updates, state = update(state)
        assert_trees_close(updates, apply(row.make(PLAN, value), REAL_PARAMS, REAL_GRADS))
    assert traces == 1


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
    with pytest.raises(ValueError, match="unflattened") as error:
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


@pytest.mark.parametrize("name", WRAPPERS)
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
