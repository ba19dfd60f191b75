"""What every sparsifier must do, as a table, and what each one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax

KEY = jax.random.key(0)


def make_params(key=KEY):
    keys = jax.random.split(key)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (8, 4)), "bias": jnp.ones(4)},
        "b": {"kernel": jax.random.normal(keys[1], (8, 4))},
    }


PARAMS = make_params()
PLAN = nmjax.make_plan(PARAMS, "2:4")
BLOCKS = nmjax.make_plan(PARAMS, "1x2@0.5")
MASKS = nmjax.compute_masks(PARAMS, PLAN)
USER_MASKS = {name: np.asarray(~mask) for name, mask in MASKS.items()}

# A new sparsifier joins by one row.
SPARSIFIERS = {
    "dense": nmjax.dense(),
    "straight_through": nmjax.straight_through(PLAN),
    "straight_through with lambda": nmjax.straight_through(PLAN, lambda_w=0.1),
    "one_shot": nmjax.one_shot(PLAN),
    "one_shot later": nmjax.one_shot(PLAN, at_step=3),
    "one_shot with masks": nmjax.one_shot(PLAN, masks=USER_MASKS),
    "one_shot with blocks": nmjax.one_shot(BLOCKS),
    "soft_uniform_blocks": nmjax.soft_uniform_blocks(BLOCKS, nmjax.linear_ramp(2, 8)),
    "soft_uniform_blocks by size": nmjax.soft_uniform_blocks(
        BLOCKS, nmjax.linear_ramp(2, 8), score="l1", variant="v1", soft=False
    ),
}


@pytest.fixture(params=SPARSIFIERS)
def sparsifier(request):
    return SPARSIFIERS[request.param]


def aval(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def drift(params, step):
    """Parameters that change, so that magnitude masks do too."""
    return jax.tree.map(lambda w: w + 0.3 * step * jnp.cos(7 * w), params)


# Every one


def test_functions_are_the_same_under_jit(sparsifier):
    state = sparsifier.init(PARAMS, KEY)
    assert_trees_equal(state, jax.jit(sparsifier.init)(PARAMS, KEY))
    refreshed = sparsifier.refresh(state, PARAMS, 3)
    assert_trees_equal(refreshed, jax.jit(sparsifier.refresh)(state, PARAMS, 3))
    sparse = sparsifier.apply(PARAMS, refreshed)
    assert_trees_equal(sparse, jax.jit(sparsifier.apply)(PARAMS, refreshed))


def test_state_is_made_of_arrays(sparsifier):
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(sparsifier.init(PARAMS, KEY)))


def test_state_keeps_shapes_and_dtypes_in_a_scan(sparsifier):
    state = sparsifier.init(PARAMS, KEY)

    def body(state, step):
        params = drift(PARAMS, step)
        state = sparsifier.refresh(state, params, step)
        return state, sparsifier.apply(params, state)

    last, sparse = jax.lax.scan(body, state, jnp.arange(6))
    assert aval(last) == aval(state)
    loop_state = state
    compiled = jax.jit(body)
    for step in range(6):
        loop_state, expected = compiled(loop_state, step)
        here = jax.tree.map(lambda x, step=step: x[step], sparse)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), here, expected
        )


def test_refresh_compiles_once(sparsifier):
    traces = 0

    @jax.jit
    def step(state, params, count):
        nonlocal traces
        traces += 1
        state = sparsifier.refresh(state, params, count)
        return state, sparsifier.apply(params, state)

    state = sparsifier.init(PARAMS, KEY)
    for count in range(5):
        state, _ = step(state, drift(PARAMS, count), count)
    assert traces == 1


def test_seeds_under_vmap(sparsifier):
    keys = jax.random.split(KEY, 3)
    params = jax.vmap(make_params)(keys)

    def run(params, key):
        state = sparsifier.init(params, key)
        state = sparsifier.refresh(state, params, 4)
        return sparsifier.apply(params, state)

    together, run = jax.jit(jax.vmap(run))(params, keys), jax.jit(run)
    for i in range(3):
        ours = jax.tree.map(lambda x, i=i: np.asarray(x)[i], together)
        assert_trees_equal(
            ours, run(jax.tree.map(lambda x, i=i: np.asarray(x)[i], params), keys[i])
        )


def test_tree_dtypes_and_dense_leaves_are_kept(sparsifier):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    sparse = sparsifier.apply(params, sparsifier.init(params, KEY))
    assert aval(sparse) == aval(params)
    np.testing.assert_array_equal(sparse["a"]["bias"], params["a"]["bias"])


def test_init_accepts_shapes(sparsifier):
    state = jax.eval_shape(sparsifier.init, jax.eval_shape(lambda: PARAMS), KEY)
    assert aval(state) == aval(sparsifier.init(PARAMS, KEY))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_state_lies_where_the_weights_do(sparsifier, axis_type):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(axis_type,), devices=jax.devices()[:2])
    rows = NamedSharding(mesh, PartitionSpec("d"))
    params = jax.device_put(PARAMS, rows)
    with jax.set_mesh(mesh):
        state = sparsifier.init(params, KEY)
        after = jax.jit(sparsifier.refresh)(state, params, 5)
        sparse = jax.jit(sparsifier.apply)(params, after)
    for masks in (getattr(state, "masks", {}), getattr(after, "masks", {})):
        assert all(mask.sharding.is_equivalent_to(rows, mask.ndim) for mask in masks.values())
    alone = jax.jit(sparsifier.refresh)(sparsifier.init(PARAMS, KEY), PARAMS, 5)
    assert_trees_equal(sparse, jax.jit(sparsifier.apply)(PARAMS, alone))


# Each one


def gradient(sparsifier, state):
    return jax.grad(lambda p: sum(jnp.sum(x) for x in jax.tree.leaves(sparsifier.apply(p, state))))(
        PARAMS
    )


def test_dense_changes_nothing():
    sparsifier = nmjax.dense()
    state = sparsifier.refresh(sparsifier.init(PARAMS, KEY), PARAMS, 0)
    assert state == ()
    assert sparsifier.apply(PARAMS, state) is PARAMS


def test_straight_through_follows_the_weights():
    sparsifier = nmjax.straight_through(PLAN)
    state = sparsifier.init(PARAMS, KEY)
    for step in range(3):
        params = drift(PARAMS, step)
        assert_trees_equal(sparsifier.apply(params, state), nmjax.prune(params, PLAN))
    assert_trees_equal(gradient(sparsifier, state), jax.tree.map(jnp.ones_like, PARAMS))


def test_straight_through_with_lambda_pulls():
    sparsifier = nmjax.straight_through(PLAN, lambda_w=0.5)
    grads = gradient(sparsifier, sparsifier.init(PARAMS, KEY))
    for name in "ab":
        w, mask = PARAMS[name]["kernel"], MASKS[f"{name}/kernel"]
        np.testing.assert_allclose(grads[name]["kernel"], 1 + 0.5 * w * ~mask, rtol=1e-6)


def test_one_shot_keeps_its_first_mask():
    sparsifier = nmjax.one_shot(PLAN)
    state = sparsifier.init(PARAMS, KEY)
    assert_trees_equal(dict(state.masks), MASKS)
    assert state.taken
    changed = drift(PARAMS, 5)
    assert nmjax.total_sad(MASKS, nmjax.compute_masks(changed, PLAN)) > 0
    for step in range(3):
        state = sparsifier.refresh(state, changed, step)
    assert_trees_equal(dict(state.masks), MASKS)
    assert_trees_equal(sparsifier.apply(changed, state), nmjax.prune(changed, PLAN, MASKS))


@pytest.mark.parametrize("steps", [range(8), [0, 2, 5, 6], [2, 4]], ids=str)
def test_one_shot_later_takes_the_mask_at_the_first_refresh_from_its_step_on(steps):
    sparsifier = nmjax.one_shot(PLAN, at_step=3)
    state = sparsifier.init(PARAMS, KEY)
    taken_at = next(step for step in steps if step >= 3)
    for step in steps:
        state = sparsifier.refresh(state, drift(PARAMS, step), step)
        if step < 3:
            assert not state.taken
            assert_trees_equal(sparsifier.apply(PARAMS, state), PARAMS)
            assert nmjax.total_density(state.masks) == 1
    assert state.taken
    expected = nmjax.compute_masks(drift(PARAMS, taken_at), PLAN)
    assert_trees_equal(dict(state.masks), expected)
    assert nmjax.total_sad(expected, MASKS) > 0  # so a mask taken too early would be noticed
    assert nmjax.total_density(state.masks) == 0.5


def test_one_shot_with_masks_keeps_the_callers():
    sparsifier = nmjax.one_shot(PLAN, masks=USER_MASKS)
    state = sparsifier.refresh(sparsifier.init(PARAMS, KEY), drift(PARAMS, 5), 7)
    assert_trees_equal(dict(state.masks), {n: jnp.asarray(m) for n, m in USER_MASKS.items()})
    assert_trees_equal(sparsifier.apply(PARAMS, state), nmjax.prune(PARAMS, PLAN, USER_MASKS))


@pytest.mark.parametrize("masks", [None, USER_MASKS], ids=["computed", "given"])
def test_one_shot_gives_no_gradient_to_pruned_weights(masks):
    sparsifier = nmjax.one_shot(PLAN, masks=masks)
    grads = gradient(sparsifier, sparsifier.init(PARAMS, KEY))
    for name in "ab":
        expected = (masks or MASKS)[f"{name}/kernel"].astype(np.float32)
        np.testing.assert_array_equal(grads[name]["kernel"], expected)
    np.testing.assert_array_equal(grads["a"]["bias"], np.ones(4))


def test_one_shot_errors():
    with pytest.raises(ValueError, match=r"at_step counts .* got -1"):
        nmjax.one_shot(PLAN, at_step=-1)
    with pytest.raises(ValueError, match="at_step=3"):
        nmjax.one_shot(PLAN, at_step=3, masks=USER_MASKS)
    flipped = {**USER_MASKS, "a/kernel": np.ones((4, 8), bool)}
    with pytest.raises(ValueError, match=r"a/kernel.*\(4, 8\).*\(8, 4\)"):
        nmjax.one_shot(PLAN, masks=flipped).init(PARAMS, KEY)
    numbers = {**USER_MASKS, "a/kernel": np.ones((8, 4), np.int32)}
    with pytest.raises(TypeError, match=r"a/kernel.*int32"):
        nmjax.one_shot(PLAN, masks=numbers).init(PARAMS, KEY)
    with pytest.raises(ValueError, match=r"missing.*b/kernel"):
        nmjax.one_shot(PLAN, masks={"a/kernel": USER_MASKS["a/kernel"]}).init(PARAMS, KEY)
    with pytest.raises(ValueError, match="b/kernel: planned as"):
        nmjax.one_shot(PLAN).init({"a": PARAMS["a"]}, KEY)


def test_masks_of_a_trained_network_freeze_its_topology():
    """The masks that one run ended with are the next one's `masks=`."""
    trained = drift(PARAMS, 2)
    masks = nmjax.compute_masks(trained, PLAN)
    frozen = nmjax.one_shot(PLAN, masks=masks)
    state = frozen.init(trained, KEY)
    tuned = drift(trained, 3)
    assert_trees_equal(frozen.apply(tuned, state), nmjax.prune(tuned, PLAN, masks))
