"""SUBP: how many blocks each row keeps, which are drawn to return, and when masks are final."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax

KEY = jax.random.key(0)
RAMP = nmjax.cubic_ramp(10, 180)


def make_params(dtype="float32", inputs=32):
    keys = jax.random.split(KEY, 2)
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, inputs, 8), dtype)},
        "dense": {"kernel": jax.random.normal(keys[1], (inputs, 16), dtype)},
        "bias": jnp.ones(8, dtype),
    }


PARAMS = make_params()
PLAN = nmjax.make_plan(PARAMS, "1x4@0.5")


@jax.jit
def drift(params, epoch):
    """Other weights than before, as training would leave them."""
    keys = jax.random.split(jax.random.fold_in(KEY, epoch), len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return jax.tree.map(lambda w, key: w + jax.random.normal(key, w.shape, w.dtype), params, noise)


def kept_in_rows(state, plan):
    """The set of numbers of blocks that rows of any layer keep."""
    return {
        count
        for counts in nmjax.blocks_per_row(state.masks, plan).values()
        for count in np.asarray(counts).ravel().tolist()
    }


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (66 / 128, {0: 256, 10: 256, 50: 254, 100: 236, 140: 196, 179: 126, 180: 124, 250: 124}),
        (98.5 / 128, {10: 256, 180: 59}),
    ],
)
@pytest.mark.parametrize("score", ["l1", pytest.param("bpar", marks=pytest.mark.slow)])
def test_blocks_kept_in_each_row_over_the_epochs(sparsity, expected, score):
    params = {"kernel": jax.random.normal(KEY, (256, 32))}
    plan = nmjax.make_plan(params, nmjax.Block1xN(16, sparsity))
    subp = nmjax.soft_uniform_blocks(plan, RAMP, score=score)
    refresh = jax.jit(subp.refresh)
    state = subp.init(params, KEY)
    for epoch in range(max(expected) + 1):
        state = refresh(state, params, epoch)
        if epoch in expected:
            assert kept_in_rows(state, plan) == {expected[epoch]}


def test_before_the_first_refresh_everything_is_kept():
    subp = nmjax.soft_uniform_blocks(PLAN, RAMP)
    assert_same(subp.apply(PARAMS, subp.init(PARAMS, KEY)), PARAMS)


@pytest.mark.parametrize(
    "score", ["l1", *(pytest.param(s, marks=pytest.mark.slow) for s in ("l2", "bpar"))]
)
def test_masks_of_v2_are_final_when_the_ramp_ends(score):
    states = run_epochs("v2", score, range(170, 190))
    for state in states[11:]:
        assert_same(state.masks, states[10].masks)
    assert nmjax.total_sad(states[0].masks, states[1].masks) > 0  # Before, they were not.
    assert kept_in_rows(states[-1], PLAN) == {16}


def test_masks_of_v1_go_on_following_the_weights():
    states = run_epochs("v1", "l1", range(178, 190))
    assert all(kept_in_rows(state, PLAN) == {16} for state in states[2:])
    assert nmjax.total_sad(states[4].masks, states[-1].masks) > 0
    last = drift(PARAMS, 189)
    assert_same(states[-1].masks, nmjax.compute_masks(last, PLAN))


def run_epochs(variant, score, epochs):
    """The state after each of the epochs, under weights that keep changing."""
    subp = nmjax.soft_uniform_blocks(PLAN, RAMP, score=score, variant=variant)
    refresh, state, states = jax.jit(subp.refresh), subp.init(PARAMS, KEY), []
    for epoch in epochs:
        state = refresh(state, drift(PARAMS, epoch), epoch)
        states.append(state)
    return states


def inclusion(weights, count):
    """How likely each of `weights` is among `count` drawn one by one without replacement."""
    chances = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), count):
        chance, left = 1.0, sum(weights)
        for i in order:
            chance *= weights[i] / left
            left -= weights[i]
        chances[list(order)] += chance
    return chances


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_blocks_return_as_often_as_in_sampling_without_replacement(temperature):
    sizes = np.array([9.0, 8.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    params = {"kernel": jnp.asarray(sizes)[:, None]}
    plan = nmjax.make_plan(params, nmjax.Block1xN(1, 5 / 8))  # Drops the last five.
    subp = nmjax.soft_uniform_blocks(
        plan, lambda step: jnp.float32(0.6), score="l1", temperature=temperature
    )  # Two of them return.
    draws = 20_000

    def draw(key):
        return subp.refresh(subp.init(params, key), params, 0).masks["kernel"][:, 0]

    often = jax.jit(jax.vmap(draw))(jax.random.split(KEY, draws)).mean(axis=0)
    logits = sizes[3:] / np.linalg.norm(sizes[3:]) / temperature
    expected = inclusion(np.exp(logits), 2)
    deviation = np.sqrt(expected * (1 - expected) / draws)
    np.testing.assert_array_equal(often[:3], 1)
    assert np.max(np.abs(often[3:] - expected) / deviation) < 4.5
    # What mistakes would give is far from it.
    chances = np.exp(logits) / np.exp(logits).sum()
    wrong = {
        "uniform": np.full(5, 2 / 5),
        "scores not normalized": inclusion(np.exp(sizes[3:] / temperature), 2),
        "normalized over the row": inclusion(
            np.exp(sizes[3:] / np.linalg.norm(sizes) / temperature), 2
        ),
        "scores as probabilities": inclusion(sizes[3:], 2),
        "with replacement": 1 - (1 - chances) ** 2,
    }
    for mistake, other in wrong.items():
        assert np.max(np.abs(other - expected) / deviation) > 9, mistake


def test_the_exported_network_is_exactly_uniform():
    subp = nmjax.soft_uniform_blocks(PLAN, RAMP)
    state = jax.jit(subp.refresh)(subp.init(PARAMS, KEY), PARAMS, 180)
    exported = nmjax.prune(PARAMS, PLAN, state.masks)
    assert_same(exported, subp.apply(PARAMS, state))
    nmjax.check_sparse(exported, PLAN)
    balance = nmjax.row_balance({n: jnp.asarray(state.masks[n]) for n in PLAN}, PLAN)
    assert all(int(rows.fewest) == int(rows.most) == 16 for rows in balance.values())
    frozen = nmjax.one_shot(PLAN, masks=state.masks)
    assert_same(frozen.apply(PARAMS, frozen.init(PARAMS, KEY)), exported)


@pytest.mark.parametrize("soft", [True, False])
def test_gradient_reaches_dropped_weights_if_soft(soft):
    subp = nmjax.soft_uniform_blocks(PLAN, RAMP, soft=soft)
    state = jax.jit(subp.refresh)(subp.init(PARAMS, KEY), PARAMS, 180)

    def loss(params):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(subp.apply(params, state)))

    grads = jax.grad(loss)(PARAMS)
    for name in PLAN:
        layer = name.split("/")[0]
        expected = np.ones_like(grads[layer]["kernel"]) if soft else state.masks[name]
        np.testing.assert_array_equal(grads[layer]["kernel"], expected)


def test_the_pull_is_on_the_weights_that_the_state_drops():
    subp = nmjax.soft_uniform_blocks(PLAN, RAMP)
    state = jax.jit(subp.refresh)(subp.init(PARAMS, KEY), PARAMS, 140)
    tx = nmjax.add_sparse_refined(PLAN, 0.5)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS, masks=state.masks)
    for name in PLAN:
        layer = name.split("/")[0]
        w = np.asarray(PARAMS[layer]["kernel"])
        expected = np.where(state.masks[name], 0, 0.5 * w)
        np.testing.assert_allclose(updates[layer]["kernel"], expected, rtol=1e-6)


def test_seeds_under_vmap_are_seeds_one_by_one():
    subp = nmjax.soft_uniform_blocks(PLAN, RAMP, score="l1")
    keys = jax.random.split(KEY, 3)
    params = jax.tree.map(lambda w: jnp.stack([w, 2 * w, w[::-1]]), PARAMS)

    def final(params, key):
        state = subp.refresh(subp.init(params, key), params, 120)
        return subp.refresh(state, params, 150)

    together = jax.jit(jax.vmap(final))(params, keys)
    one = jax.jit(final)
    for i in range(3):
        alone = one(jax.tree.map(lambda w, i=i: w[i], params), keys[i])
        assert_same(jax.tree.map(lambda x, i=i: x[i], together), alone)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("score", ["l1", pytest.param("bpar", marks=pytest.mark.slow)])
def test_eight_devices_draw_as_one(axis_type, score):
    params = {"kernel": jax.random.normal(KEY, (16, 64))}
    plan = nmjax.make_plan(params, "1x4@0.5")
    subp = nmjax.soft_uniform_blocks(plan, RAMP, score=score)

    def two_epochs(params):
        state = subp.refresh(subp.init(params, KEY), params, 100)
        return subp.refresh(state, params, 150).masks["kernel"]

    expected = jax.jit(two_epochs)(params)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(None, "d"))
        mask = jax.jit(two_epochs)(jax.device_put(params, sharding))
        assert mask.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(jax.device_get(mask), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights(dtype):
    params = make_params(dtype)
    subp = nmjax.soft_uniform_blocks(PLAN, RAMP)
    state = jax.jit(subp.refresh)(subp.init(params, KEY), params, 100)
    assert len(kept_in_rows(state, PLAN)) == 1
    chex.assert_trees_all_equal_dtypes(subp.apply(params, state), params)


def test_other_keys_draw_other_blocks():
    subp = nmjax.soft_uniform_blocks(PLAN, RAMP)
    refresh = jax.jit(subp.refresh)
    states = [refresh(subp.init(PARAMS, key), PARAMS, 150) for key in jax.random.split(KEY)]
    assert nmjax.total_sad(states[0].masks, states[1].masks) > 0
    again = refresh(subp.init(PARAMS, jax.random.split(KEY)[0]), PARAMS, 150)
    assert_same(again.masks, states[0].masks)


def through_numpy(state, path):
    leaves, structure = jax.tree.flatten(state)
    np.savez(path / "state.npz", *leaves)
    with np.load(path / "state.npz") as read:
        return jax.tree.unflatten(structure, [jnp.asarray(read[name]) for name in read.files])


def through_orbax(state, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", jax.eval_shape(lambda: state))


@pytest.mark.parametrize("round_trip", [through_numpy, through_orbax])
def test_a_restored_state_draws_as_the_saved_one_would(round_trip, tmp_path):
    subp = nmjax.soft_uniform_blocks(PLAN, RAMP)
    refresh = jax.jit(subp.refresh)
    state = refresh(subp.init(PARAMS, KEY), PARAMS, 120)
    restored = round_trip(state, tmp_path)
    assert type(restored) is nmjax.SoftBlocksState
    chex.assert_trees_all_equal_dtypes(restored, state)
    assert_same(restored, state)
    assert_same(refresh(restored, PARAMS, 150), refresh(state, PARAMS, 150))


def test_v2_is_final_even_where_kept_weights_are_zero():
    """Scores of kept zeros tie with those of dropped blocks; what is dropped still ranks last."""
    subp = nmjax.soft_uniform_blocks(PLAN, RAMP, score="l1")
    state, refresh = subp.init(PARAMS, KEY), jax.jit(subp.refresh)
    for epoch in (100, 180):
        state = refresh(state, drift(PARAMS, epoch), epoch)
    after = refresh(state, jax.tree.map(jnp.zeros_like, PARAMS), 200)
    assert_same(after.masks, state.masks)


def test_in_v2_dropped_blocks_return_only_by_being_drawn():
    """Dropped weights that have become the largest: V1 takes them back by rank, V2 does not."""
    params = {"kernel": jnp.ones((20, 2)) + jnp.arange(20.0)[:, None]}
    plan = nmjax.make_plan(params, "1x2@0.5")
    grown = {"kernel": params["kernel"].at[:10].add(1000)}
    returned = {}
    for variant in ("v1", "v2"):
        subp = nmjax.soft_uniform_blocks(plan, nmjax.linear_ramp(0, 1), score="l1", variant=variant)
        refresh = jax.jit(subp.refresh)
        state = refresh(subp.init(params, KEY), params, 5)
        after = refresh(state, grown, 6)
        returned[variant] = nmjax.blocks_regrown(state.masks, after.masks, plan)["kernel"].item()
    assert returned == {"v1": 10, "v2": 0}


@pytest.mark.parametrize(
    ("sparsity", "inputs"), [(0.05, 7), (1 / 3, 10), (0.29, 100), (0.7, 10), (0.999, 100)]
)
def test_all_stay_before_the_ramp_and_the_pattern_holds_after_it(sparsity, inputs):
    """Products with a fraction of float64 that float32 does not have leave no block over."""
    params = {"kernel": jax.random.normal(KEY, (inputs, 4))}
    plan = nmjax.make_plan(params, nmjax.Block1xN(2, sparsity))
    subp = nmjax.soft_uniform_blocks(plan, nmjax.linear_ramp(5, 9), score="l1")
    state, refresh = subp.init(params, KEY), jax.jit(subp.refresh)
    counts = []
    for step in (5, 7, 9):
        state = refresh(state, params, step)
        counts.append(int(state.masks["kernel"].sum()))
    assert counts[0] == 4 * inputs
    assert counts[0] >= counts[1] >= counts[2] == plan["kernel"].kept


def released_bpar(blocks, kept):
    """`BlockAngularRedundancy` of the released code on blocks (rows, inputs, block), in float64."""
    size = np.abs(blocks).sum(-1)
    size = size / size.sum(-1, keepdims=True)
    masked = blocks * kept[..., None]
    unit = masked / np.maximum(np.linalg.norm(masked, axis=-1, keepdims=True), 1e-12)
    angles = np.abs(np.einsum("ijk,ink->ijn", unit, unit)).sum(-1)
    angles = angles / angles.sum(-1, keepdims=True)
    return size - np.where(angles == 0, 1, angles)


def test_v1_with_bpar_drops_what_the_released_code_drops():
    """Its angles are those of the masked weights, so dropped blocks stay last."""
    params = {"kernel": jax.random.normal(KEY, (32, 16))}
    plan = nmjax.make_plan(params, "1x4@0.5")
    subp = nmjax.soft_uniform_blocks(plan, nmjax.linear_ramp(0, 10), variant="v1")
    state, refresh = subp.init(params, KEY), jax.jit(subp.refresh)
    differ = 0
    for epoch in range(14):
        moved = drift(params, epoch)
        kept = np.asarray(state.masks["kernel"]).T.reshape(4, 4, 32)[:, 0]
        blocks = np.asarray(moved["kernel"], np.float64).T.reshape(4, 4, 32).swapaxes(1, 2)
        order = released_bpar(blocks, kept).argsort(-1)
        own = released_bpar(blocks, np.ones_like(kept)).argsort(-1)
        state = refresh(state, moved, epoch)
        now = np.asarray(state.masks["kernel"]).T.reshape(4, 4, 32)[:, 0]
        # All that the score keeps; the draw adds more of the others.
        assert np.take_along_axis(now, order[:, 16:], -1).all()
        dropped = np.take_along_axis(now, order[:, :16], -1)
        assert (dropped.sum(-1) == max(16 * (10 - epoch) // 10, 0)).all()
        differ += sum(set(a) != set(b) for a, b in zip(order[:, 16:], own[:, 16:], strict=True))
    assert differ > 0  # Angles of the dense weights would drop others.


def test_layers_stacked_by_a_scan_are_masked_one_by_one():
    w = jax.random.normal(KEY, (3, 16, 8))
    stacked = {"layer": {"kernel": w, "bias": jnp.zeros((3, 8))}}
    plan = nmjax.make_plan(stacked, "1x4@0.5")
    subp = nmjax.soft_uniform_blocks(plan, RAMP, score="bpar")
    state = jax.jit(subp.refresh)(subp.init(stacked, KEY), stacked, 200)
    for layer, mask in zip(w, state.masks["layer/kernel"], strict=True):
        np.testing.assert_array_equal(mask, nmjax.block_mask(layer, 4, 0.5, "bpar"))


def test_layers_and_epochs_draw_differently():
    params = {n: {"kernel": jnp.ones((64, 8))} for n in "ab"}  # Equal scores: only chance decides.
    plan = nmjax.make_plan(params, "1x8@0.75")
    subp = nmjax.soft_uniform_blocks(plan, nmjax.linear_ramp(0, 10), variant="v1")
    refresh = jax.jit(subp.refresh)
    first = refresh(subp.init(params, KEY), params, 5)
    second = refresh(first, params, 5)
    assert (first.masks["a/kernel"] != first.masks["b/kernel"]).any()
    assert (first.masks["a/kernel"] != second.masks["a/kernel"]).any()


def test_nothing_is_fetched_to_the_host():
    subp = nmjax.soft_uniform_blocks(PLAN, RAMP)
    refresh, step = jax.jit(subp.refresh), jnp.int32(50)
    state = refresh(subp.init(PARAMS, KEY), PARAMS, step)
    with jax.transfer_guard("disallow"):
        refresh(state, PARAMS, step)


def test_a_layer_of_another_pattern_is_named():
    plan = nmjax.make_plan(PARAMS, "1x4@0.5", rules={"dense": "2:4"})
    with pytest.raises(ValueError, match=r"dense/kernel \(32, 16\): 2:4"):
        nmjax.soft_uniform_blocks(plan, RAMP)
    plan = nmjax.make_plan(PARAMS, "1x4@0.5/layer")
    with pytest.raises(ValueError, match="conv/kernel"):
        nmjax.soft_uniform_blocks(plan, RAMP)


def test_a_score_in_the_plan_is_not_overlooked():
    plan = nmjax.make_plan(PARAMS, "1x4@0.5", score=jnp.square)
    with pytest.raises(
        ValueError, match=r"ranks blocks by its own score=, but the plan has the score .*square"
    ):
        nmjax.soft_uniform_blocks(plan, RAMP)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "v3"}, "v3"),
        ({"score": "l3"}, "l3"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        nmjax.soft_uniform_blocks(PLAN, RAMP, **options)


def test_training_ends_sparse():
    """A regression problem, twenty epochs: the loss falls, and the end is uniform."""
    params = {"kernel": 0.1 * jax.random.normal(KEY, (32, 8))}
    plan = nmjax.make_plan(params, "1x4@0.5")
    target = nmjax.prune({"kernel": jax.random.normal(jax.random.key(1), (32, 8))}, plan)["kernel"]
    x = jax.random.normal(jax.random.key(2), (256, 32))
    subp = nmjax.soft_uniform_blocks(plan, nmjax.cubic_ramp(20, 160))
    tx = optax.chain(nmjax.add_sparse_refined(plan, 2e-4), optax.sgd(0.1, momentum=0.9))

    def loss(params, state):
        return jnp.mean((x @ subp.apply(params, state)["kernel"] - x @ target) ** 2)

    @jax.jit
    def step(params, opt_state, state):
        grads = jax.grad(loss)(params, state)
        updates, opt_state = tx.update(grads, opt_state, params, masks=state.masks)
        return optax.apply_updates(params, updates), opt_state

    state, opt_state = subp.init(params, KEY), tx.init(params)
    first = loss(params, state)
    refresh = jax.jit(subp.refresh)
    for count in range(200):
        if count % 10 == 0:
            state = refresh(state, params, count)
        params, opt_state = step(params, opt_state, state)
    assert kept_in_rows(state, plan) == {16}
    assert loss(params, state) < 0.05 * first
