"""What every method must do, as a table that a new method joins by one row."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax
from nmjax import methods
from tests.nmjax.methods.cases import BLOCKS, KEY, PARAMS, PLAN, USER_MASKS, drift, make_params


class Row(NamedTuple):
    """A method and the plan whose patterns its weights have after the refresh at step 3."""

    make: Callable[[], nmjax.Sparsifier]
    plan: nmjax.Plan | None  # None: some weights may not be sparse by then.


METHODS = {
    "dense": Row(methods.dense, None),
    "straight_through": Row(lambda: methods.straight_through(PLAN), PLAN),
    "straight_through with lambda": Row(lambda: methods.straight_through(PLAN, lambda_w=0.1), PLAN),
    "decaying_mask": Row(
        lambda: methods.decaying_mask(PLAN, 1, 5, gradient="scaled", lambda_w=0.1), None
    ),
    "decaying_mask at its end": Row(lambda: methods.decaying_mask(PLAN, 0, 3), PLAN),
    "decaying_mask of the structure": Row(
        lambda: methods.decaying_mask(PLAN, 0, 3, decay="stepwise"), PLAN
    ),
    "bi_mask": Row(lambda: methods.bi_mask(PLAN, lambda_w=0.1, refresh_every=2, tries=3), PLAN),
    "sup_tickets": Row(lambda: methods.sup_tickets(PLAN, 0, 3, 1, lambda_w=0.1), PLAN),
    "sup_tickets of blocks": Row(lambda: methods.sup_tickets(BLOCKS, 0, 1, 3), BLOCKS),
    "free_tickets": Row(lambda: methods.free_tickets(PLAN, 2, 2, 2, drop=0.5), PLAN),
    "dense_then": Row(lambda: methods.dense_then(PLAN, 5), None),
    "max_q": Row(lambda: methods.max_q(PLAN, nmjax.linear_ramp(0, 3), lambda_w=0.1), PLAN),
    "s_ste": Row(lambda: methods.s_ste(PLAN), PLAN),
    "one_shot": Row(lambda: methods.one_shot(PLAN), PLAN),
    "one_shot later": Row(lambda: methods.one_shot(PLAN, at_step=3), PLAN),
    "one_shot with masks": Row(lambda: methods.one_shot(PLAN, masks=USER_MASKS), PLAN),
    "one_shot with blocks": Row(lambda: methods.one_shot(BLOCKS), BLOCKS),
    "soft_uniform_blocks": Row(
        lambda: methods.soft_uniform_blocks(BLOCKS, nmjax.linear_ramp(2, 8)), None
    ),
    "soft_uniform_blocks at its end": Row(
        lambda: methods.soft_uniform_blocks(BLOCKS, nmjax.linear_ramp(1, 3)), BLOCKS
    ),
    "soft_uniform_blocks by size": Row(
        lambda: methods.soft_uniform_blocks(
            BLOCKS, nmjax.linear_ramp(2, 8), score="l1", variant="v1", soft=False
        ),
        None,
    ),
}


# Endings of functions that help a method.
NOT_METHODS = (
    "_ramp",
    "_scale",
    "_weights",
    "_matmul",
    "_rate",
    "mvue_24",
    "tickets_of",
    "ensemble",
)

# Whole training steps of these run by default in test_steps.
SLOW = (
    "sup_tickets",
    "sup_tickets of blocks",
    "free_tickets",
    "bi_mask",
    "max_q",
    "dense_then",
    "s_ste",
    "decaying_mask",
    "decaying_mask of the structure",
)


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in METHODS]
)
def row(request):
    return METHODS[request.param]


@pytest.fixture
def sparsifier(row):
    return row.make()


def aval(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def test_functions_are_the_same_under_jit(sparsifier):
    state = sparsifier.init(PARAMS, KEY)
    chex.assert_trees_all_equal(state, jax.jit(sparsifier.init)(PARAMS, KEY))
    refreshed = sparsifier.refresh(state, PARAMS, 3)
    chex.assert_trees_all_equal(refreshed, jax.jit(sparsifier.refresh)(state, PARAMS, 3))
    sparse = sparsifier.apply(PARAMS, refreshed)
    chex.assert_trees_all_equal(sparse, jax.jit(sparsifier.apply)(PARAMS, refreshed))


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
        chex.assert_trees_all_close(here, expected, rtol=1e-5, atol=1e-6)


def test_refresh_compiles_once(sparsifier):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, params, count):
        state = sparsifier.refresh(state, params, count)
        return state, sparsifier.apply(params, state)

    state = sparsifier.init(PARAMS, KEY)
    for count in range(5):
        state, _ = step(state, drift(PARAMS, count), count)


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
        alone = run(jax.tree.map(lambda x, i=i: np.asarray(x)[i], params), keys[i])
        # Sums over a weight may round differently; a mask that differs would show.
        chex.assert_trees_all_close(ours, alone, rtol=1e-6)


def test_tree_dtypes_and_dense_leaves_are_kept(sparsifier):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    sparse = sparsifier.apply(params, sparsifier.init(params, KEY))
    assert aval(sparse) == aval(params)
    np.testing.assert_array_equal(sparse["a"]["bias"], params["a"]["bias"])


def test_init_accepts_shapes(sparsifier):
    state = jax.eval_shape(sparsifier.init, jax.eval_shape(lambda: PARAMS), KEY)
    assert aval(state) == aval(sparsifier.init(PARAMS, KEY))


@pytest.mark.one_in(2)
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
    chex.assert_trees_all_close(sparse, jax.jit(sparsifier.apply)(PARAMS, alone), rtol=1e-6)


def test_a_state_from_a_checkpoint_goes_on_as_before(sparsifier):
    """A checkpoint gives back NumPy arrays."""
    state = sparsifier.refresh(sparsifier.init(PARAMS, KEY), PARAMS, 1)
    restored = jax.tree.map(np.asarray, state)
    params = drift(PARAMS, 4)
    expected = sparsifier.refresh(state, params, 4)
    chex.assert_trees_all_equal(sparsifier.refresh(restored, params, 4), expected)
    chex.assert_trees_all_equal(sparsifier.apply(params, restored), sparsifier.apply(params, state))


def test_other_leaves_get_their_gradient(sparsifier):
    state = sparsifier.refresh(sparsifier.init(PARAMS, KEY), PARAMS, 3)
    grads = jax.grad(lambda p: jnp.sum(sparsifier.apply(p, state)["a"]["bias"] ** 2))(PARAMS)
    np.testing.assert_array_equal(grads["a"]["bias"], 2 * PARAMS["a"]["bias"])


def test_weights_have_the_pattern_once_the_method_prunes(row, sparsifier):
    if row.plan is None:
        pytest.skip("some weights are dense at this step")
    state = sparsifier.refresh(sparsifier.init(PARAMS, KEY), PARAMS, 3)
    sparse = sparsifier.apply(PARAMS, state)
    nmjax.check_sparse(sparse, row.plan)
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, sparse, PARAMS)))


def test_what_was_trained_is_exported_and_packed(row, sparsifier):
    """After the masks were made the weights drift, so that masks made from them would differ."""
    state = sparsifier.refresh(sparsifier.init(PARAMS, KEY), PARAMS, 3)
    params = drift(PARAMS, 5)
    trained = sparsifier.apply(params, state)
    if row.plan is None and jax.tree.leaves(state):
        with pytest.raises(ValueError, match=r"(?s)a/kernel \(.*more than"):
            sparsifier.export(params, state)
        return
    exported = sparsifier.export(params, state)
    chex.assert_trees_all_equal(exported, trained)
    if row.plan is not None:
        packed = nmjax.pack(exported, row.plan)
        chex.assert_trees_all_equal(nmjax.unpack(packed), trained)


def test_every_method_has_a_row():
    made_by = {name.split()[0] for name in METHODS}
    functions = {name for name in methods.__all__ if inspect.isfunction(getattr(methods, name))}
    others = {name for name in functions if name.endswith(NOT_METHODS)}
    # A `Method` has its row in test_steps, with its optimizer.
    assert made_by == functions - others - {"step", "cast", "lbc", "hu_2024"}
