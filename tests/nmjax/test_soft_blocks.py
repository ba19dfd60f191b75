"""Soft uniform blocks: how many stay, which come back, and when masks are final."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax.blocks import split_blocks

KEY = jax.random.key(0)
BEGIN, END = 10, 180


def make_params(key=KEY):
    keys = jax.random.split(key, 3)
    return {
        "stem": {"kernel": jax.random.normal(keys[0], (3, 3, 3, 8))},
        "conv": {"kernel": jax.random.normal(keys[1], (3, 3, 8, 16)), "bias": jnp.ones(16)},
        "dense": {"kernel": jax.random.normal(keys[2], (24, 32))},
    }


PARAMS = make_params()
PLAN = nmjax.make_plan(PARAMS, "1x8@0.6", exclude="stem")
RAMP = nmjax.cubic_ramp(BEGIN, END)
VARIANTS = ["v1", "v2"]


def drift(params, step):
    """Parameters that change, so that scores do too."""
    return jax.tree.map(lambda w: w + 0.3 * jnp.sin(step + 7 * w), params)


def run(sparsifier, steps, params=PARAMS, key=KEY):
    """The masks after each refresh, the weights drifting from one to the next."""
    state, refresh = sparsifier.init(params, key), jax.jit(sparsifier.refresh)
    masks = []
    for step in steps:
        state = refresh(state, drift(params, step), step)
        masks.append(state.masks)
    return masks


def kept_by_hand(sparsity, inputs, epoch, begin=BEGIN, end=END):
    """C - floor(p C) + floor((p - p_t) C), in float64."""
    rate = sparsity * min(max((epoch - begin) / (end - begin), 0), 1) ** 3
    dropped = math.floor(sparsity * inputs)
    return inputs - dropped + min(math.floor((sparsity - rate) * inputs + 1e-9), dropped)


# How many stay


@pytest.mark.parametrize(
    ("variant", "sparsity", "kept"),
    [
        (
            "v2",
            66 / 128,
            {0: 256, 10: 256, 50: 254, 100: 236, 140: 196, 179: 126, 180: 124, 250: 124},
        ),
        ("v1", 98.5 / 128, {10: 256, 180: 59, 250: 59}),
    ],
)
def test_the_papers_schedule(variant, sparsity, kept):
    params = {"kernel": jax.random.normal(KEY, (256, 32))}
    plan = nmjax.make_plan(params, nmjax.Block1xN(16, sparsity))
    sparsifier = nmjax.soft_uniform_blocks(plan, RAMP, score="l1", variant=variant)
    for epoch, masks in zip(kept, run(sparsifier, kept, params), strict=True):
        counts = nmjax.blocks_per_row(masks, plan)["kernel"]
        assert counts.tolist() == [kept[epoch]] * 2
        assert kept_by_hand(sparsity, 256, epoch) == kept[epoch]


@pytest.mark.parametrize(("variant", "score"), [("v1", "bpar"), ("v2", "bpar"), ("v2", "l2")])
def test_every_row_keeps_the_same_whole_blocks_in_every_epoch(variant, score):
    sparsifier = nmjax.soft_uniform_blocks(PLAN, RAMP, score=score, variant=variant)
    for epoch, masks in zip(range(0, 200, 15), run(sparsifier, range(0, 200, 15)), strict=True):
        for name, (fewest, most) in nmjax.row_balance(masks, PLAN).items():
            expected = kept_by_hand(0.6, PLAN[name].inputs, epoch)
            assert (fewest, most) == (expected, expected)
            blocks = np.asarray(split_blocks(masks[name], 8, PLAN[name].axes))
            assert (blocks == blocks[..., :1]).all()


@pytest.mark.parametrize(
    ("sparsity", "inputs"), [(0.05, 7), (1 / 3, 10), (0.29, 100), (0.7, 10), (0.999, 100)]
)
def test_all_stay_before_the_ramp_and_the_pattern_holds_after_it(sparsity, inputs):
    params = {"kernel": jax.random.normal(KEY, (inputs, 4))}
    plan = nmjax.make_plan(params, nmjax.Block1xN(2, sparsity))
    sparsifier = nmjax.soft_uniform_blocks(plan, nmjax.linear_ramp(5, 9), score="l1")
    first, during, last = run(sparsifier, [5, 7, 9], params)
    assert nmjax.total_density(first) == 1
    assert int(during["kernel"].sum()) >= int(last["kernel"].sum())
    assert int(last["kernel"].sum()) == plan["kernel"].kept


def test_the_network_that_is_exported_is_exactly_uniform():
    sparsifier = nmjax.soft_uniform_blocks(PLAN, RAMP)
    masks = run(sparsifier, [0, 60, 120, 180])[-1]
    pruned = nmjax.prune(PARAMS, PLAN, masks)
    for name, leaf in PLAN.items():
        module = name.split("/")[0]
        blocks = np.asarray(split_blocks(pruned[module]["kernel"], 8, leaf.axes))
        kept = (blocks != 0).any(axis=-1).sum(axis=-1)
        assert set(kept.ravel().tolist()) == {leaf.pattern.kept_blocks(leaf.inputs)}
        assert (blocks != 0).sum() == leaf.kept


# When masks are final


@pytest.mark.parametrize("score", ["l1", "bpar"])
def test_v2_never_changes_after_the_ramp(score):
    sparsifier = nmjax.soft_uniform_blocks(PLAN, RAMP, score=score)
    masks = run(sparsifier, [0, 90, 150, 179, 180, 181, 190, 250])
    final = masks[4]
    assert nmjax.total_sad(masks[2], final) > 0
    for later in masks[5:]:
        assert nmjax.total_sad(final, later) == 0


def test_v2_is_final_even_where_kept_weights_are_zero():
    """Scores of kept zeros tie with those of dropped blocks; what is dropped still ranks last."""
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    sparsifier = nmjax.soft_uniform_blocks(PLAN, RAMP, score="l1")
    state, refresh = sparsifier.init(PARAMS, KEY), jax.jit(sparsifier.refresh)
    for step in (100, 180):
        state = refresh(state, drift(PARAMS, step), step)
    after = refresh(state, zeros, 200)
    assert nmjax.total_sad(state.masks, after.masks) == 0


def test_v1_follows_the_dense_weights_for_good():
    sparsifier = nmjax.soft_uniform_blocks(PLAN, RAMP, score="l1", variant="v1")
    masks = run(sparsifier, [0, 180, 190])
    assert nmjax.total_sad(masks[1], masks[2]) > 0
    expected = nmjax.compute_masks(drift(PARAMS, 190), PLAN)
    assert nmjax.total_sad(masks[2], expected) == 0


def test_v2_lets_dropped_blocks_return_only_by_being_drawn():
    """Dropped weights that have become the largest: V1 takes them back by rank, V2 does not."""
    params = {"kernel": jnp.ones((20, 2)) + jnp.arange(20.0)[:, None]}
    plan = nmjax.make_plan(params, "1x2@0.5")
    grown = {"kernel": params["kernel"].at[:10].add(1000)}
    returned = {}
    for variant in VARIANTS:
        sparsifier = nmjax.soft_uniform_blocks(
            plan, nmjax.linear_ramp(0, 1), score="l1", variant=variant
        )
        refresh = jax.jit(sparsifier.refresh)
        state = refresh(sparsifier.init(params, KEY), params, 5)
        after = refresh(state, grown, 6)
        returned[variant] = int(nmjax.blocks_regrown(state.masks, after.masks, plan)["kernel"])
    assert returned == {"v1": 10, "v2": 0}


# Which blocks come back


def inclusion_by_enumeration(logits, count):
    """How probable each item is to be among `count` drawn one by one without replacement."""
    weights = np.exp(np.asarray(logits, np.float64))
    included = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), count):
        probability, left = 1.0, weights.sum()
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        included[list(order)] += probability
    return included


@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_blocks_are_drawn_by_their_scores_without_replacement(temperature):
    """6 of 10 blocks are dropped and 3 of them drawn; 4000 keys against exact probabilities."""
    draws = 4000
    scores = jnp.array([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0.5])
    params = {"kernel": jnp.repeat(scores[:, None], 2, axis=1) / 2}
    plan = nmjax.make_plan(params, "1x2@0.6")
    sparsifier = nmjax.soft_uniform_blocks(
        plan, nmjax.linear_ramp(0, 10), score="l1", variant="v1", temperature=temperature
    )

    def masks(key):
        return sparsifier.refresh(sparsifier.init(params, key), params, 5).masks["kernel"][:, 0]

    kept = np.asarray(jax.jit(jax.vmap(masks))(jax.random.split(KEY, draws)))
    assert (kept.sum(axis=1) == 7).all()
    assert kept[:, :4].all()
    dropped = np.asarray(scores)[4:]
    expected = inclusion_by_enumeration(dropped / np.linalg.norm(dropped) / temperature, 3)
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(kept[:, 4:].mean(axis=0) - expected) < 4 * deviation).all()
    # The control: this many draws do tell the distribution from an even one.
    assert (np.abs(expected - 0.5) > 4 * deviation).any()


def test_keys_layers_and_epochs_draw_differently():
    params = {n: {"kernel": jnp.ones((64, 8))} for n in "ab"}  # Equal scores: only chance decides.
    plan = nmjax.make_plan(params, "1x8@0.75")
    sparsifier = nmjax.soft_uniform_blocks(plan, nmjax.linear_ramp(0, 10), variant="v1")
    refresh = jax.jit(sparsifier.refresh)
    state = refresh(sparsifier.init(params, KEY), params, 5)
    again = refresh(state, params, 5)
    other = refresh(sparsifier.init(params, jax.random.key(1)), params, 5)
    same = refresh(sparsifier.init(params, KEY), params, 5)
    drawn = [state.masks["a/kernel"], state.masks["b/kernel"]]
    drawn += [again.masks["a/kernel"], other.masks["a/kernel"]]
    for a, b in itertools.combinations(drawn, 2):
        assert (a != b).any()
    assert nmjax.total_sad(state.masks, same.masks) == 0


# Gradients


def gradient(sparsifier, state):
    def total(params):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sparsifier.apply(params, state)))

    return jax.grad(total)(PARAMS)


@pytest.mark.parametrize("soft", [True, False])
def test_soft_gradients_pass_straight_through_and_hard_ones_stop(soft):
    sparsifier = nmjax.soft_uniform_blocks(PLAN, RAMP, soft=soft)
    state = sparsifier.init(PARAMS, KEY)
    state = jax.jit(sparsifier.refresh)(state, PARAMS, 200)
    sparse = sparsifier.apply(PARAMS, state)
    jax.tree.map(np.testing.assert_array_equal, sparse, nmjax.prune(PARAMS, PLAN, state.masks))
    grads = gradient(sparsifier, state)
    np.testing.assert_array_equal(grads["stem"]["kernel"], 1)
    for name in ("conv", "dense"):
        mask = state.masks[f"{name}/kernel"]
        assert not mask.all()
        np.testing.assert_array_equal(grads[name]["kernel"], 1 if soft else mask)


def test_the_pull_on_dropped_weights_goes_by_the_masks_of_the_state():
    sparsifier = nmjax.soft_uniform_blocks(PLAN, RAMP)
    state = jax.jit(sparsifier.refresh)(sparsifier.init(PARAMS, KEY), PARAMS, 150)
    tx = optax.chain(nmjax.add_sparse_refined(PLAN, 0.5), optax.sgd(1.0))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS, masks=state.masks)
    for name in ("conv", "dense"):
        w, mask = PARAMS[name]["kernel"], state.masks[f"{name}/kernel"]
        np.testing.assert_allclose(updates[name]["kernel"], -0.5 * w * ~mask)
    assert not updates["stem"]["kernel"].any()


# Loops, seeds and meshes


def test_one_compilation_for_all_epochs():
    traces = []
    sparsifier = nmjax.soft_uniform_blocks(PLAN, RAMP)

    @jax.jit
    def refresh(state, params, step):
        traces.append(step)
        return sparsifier.refresh(state, params, step)

    state = sparsifier.init(PARAMS, KEY)
    for epoch in range(0, 200, 20):
        state = refresh(state, drift(PARAMS, epoch), epoch)
    assert len(traces) == 1


def test_nothing_is_fetched_to_the_host():
    sparsifier = nmjax.soft_uniform_blocks(PLAN, RAMP)
    state, refresh = sparsifier.init(PARAMS, KEY), jax.jit(sparsifier.refresh)
    step = jnp.int32(50)
    state = refresh(state, PARAMS, step)
    with jax.transfer_guard("disallow"):
        refresh(state, PARAMS, step)


def test_layers_stacked_by_a_scan_are_masked_one_by_one():
    """A layer of a stack keeps what the layer alone would, up to what chance decides."""
    w = jax.random.normal(KEY, (3, 16, 8))
    stacked = {"layer": {"kernel": w, "bias": jnp.zeros((3, 8))}}
    plan = nmjax.make_plan(stacked, "1x4@0.5")
    sparsifier = nmjax.soft_uniform_blocks(plan, RAMP, score="bpar")
    state = jax.jit(sparsifier.refresh)(sparsifier.init(stacked, KEY), stacked, 200)
    for layer, mask in zip(w, state.masks["layer/kernel"], strict=True):
        np.testing.assert_array_equal(mask, nmjax.block_mask(layer, 4, 0.5, "bpar"))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("spec", "score"), [("in", "bpar"), ("out", "bpar"), ("out", "l1")])
def test_eight_devices_draw_as_one(axis_type, score, spec):
    specs = {
        "in": (P(None, None, "d"), P("d")),
        "out": (P(None, None, None, "d"), P(None, "d")),
    }[spec]
    params = {
        "conv": jax.random.normal(KEY, (3, 3, 16, 32)),
        "dense": jax.random.normal(KEY, (32, 64)),
    }
    plan = nmjax.make_plan(
        params, "1x4@0.6", axes={"conv": nmjax.Axes((-2,), (-1,), (-4, -3)), "dense": -2}
    )
    sparsifier = nmjax.soft_uniform_blocks(plan, RAMP, score=score)

    def refreshed(params):
        state, refresh = sparsifier.init(params, KEY), jax.jit(sparsifier.refresh)
        for step in (60, 120):
            state = refresh(state, drift(params, step), step)
        return state

    alone = refreshed(params)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(w, NamedSharding(mesh, spec))
            for (name, w), spec in zip(params.items(), specs, strict=True)
        }
        together = refreshed(placed)
    assert nmjax.total_sad(jax.device_get(together.masks), jax.device_get(alone.masks)) == 0
    assert 0 < nmjax.total_density(alone.masks) < 1
    for name, mask in together.masks.items():
        assert mask.sharding.is_equivalent_to(placed[name].sharding, mask.ndim), name
    np.testing.assert_array_equal(jax.device_get(together.key), alone.key)


# What is refused


def test_every_leaf_with_another_pattern_is_named():
    params = {**PARAMS, "other": {"kernel": jnp.ones((16, 16))}}
    rules = {"dense": "2:4", "other": "1x8@0.5/layer"}
    plan = nmjax.make_plan(params, "1x8@0.5", rules=rules)
    with pytest.raises(ValueError, match="uniform pattern of blocks for every leaf") as error:
        nmjax.soft_uniform_blocks(plan, RAMP)
    assert "dense/kernel (24, 32): 2:4" in str(error.value)
    assert "other/kernel (16, 16): 1x8@0.5/layer" in str(error.value)
    assert "conv" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "v3"}, ValueError, '"v1" or "v2", got \'v3\''),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"score": "l7"}, ValueError, "no block score is called 'l7'"),
        ({"score": None}, TypeError, "a name or a function"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        nmjax.soft_uniform_blocks(PLAN, RAMP, **options)


def test_parameters_that_do_not_fit():
    sparsifier = nmjax.soft_uniform_blocks(PLAN, RAMP)
    with pytest.raises(ValueError, match="dense/kernel: planned as"):
        sparsifier.init({"conv": PARAMS["conv"]}, KEY)
