"""Plans of weights that a program slices and reorders, against the operand that it multiplies by.

The oracle runs the program's moves on a pruned weight, and looks at the groups of the result.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

import nmjax

ROWS, COLUMNS = 16, 12
SHUFFLED = [0, 4, 1, 5, 2, 6, 3, 7]


def weight(seed, shape=(ROWS, COLUMNS)):
    return jax.random.normal(jax.random.key(seed), shape)


def is_2_of_4(operand):
    groups = (np.asarray(operand) != 0).reshape(len(operand) // 4, 4, -1).sum(1)
    return len(operand) % 4 == 0 and groups.max() <= 2


def is_1_by_4(operand):
    blocks = (np.asarray(operand) != 0).reshape(len(operand), -1, 4).sum(-1)
    return set(np.unique(blocks)) <= {0, 4}


def is_kept(move, pattern, check):
    """Whether the operand of every one of some pruned weights has the pattern."""
    plan = nmjax.make_plan({"w": weight(0)}, pattern, axes={"w": nmjax.Axes((-2,), (-1,))})
    pruned = [nmjax.prune({"w": weight(seed)}, plan)["w"] for seed in range(5)]
    return all(check(move(w)) for w in pruned)


def plan_of(move, pattern):
    """The plan of a product with the moved weight; None if nmjax refuses it."""
    rows = jax.eval_shape(move, weight(0)).shape[0]

    def forward(params, x):
        return x @ move(params["w"])

    params, x = {"w": weight(0)}, jnp.ones((2, rows))
    try:
        plan = nmjax.make_plan(params, pattern, forward=forward, inputs=(x,))
    except ValueError as error:
        refusal = str(error)
    else:
        nmjax.check_axes(plan, forward, params, x)
        return plan
    assert "unknown axes" in refusal
    assert "  w (16, 12): " in refusal
    # Weights that cannot be followed to a product are not checked.
    if "the program breaks" in refusal:
        by_name = {"Dense_0": {"kernel": weight(0)}}

        def layer(params, x):
            return forward({"w": params["Dense_0"]["kernel"]}, x)

        with pytest.raises(ValueError, match="the plan and the program disagree"):
            nmjax.check_axes(nmjax.make_plan(by_name, pattern), layer, by_name, x)
    return None


def interleaved(w):
    return w.reshape(2, 8, COLUMNS).transpose(1, 0, 2).reshape(ROWS, COLUMNS)


def swapped_tiles(w):
    return w.reshape(2, 2, 4, COLUMNS).transpose(1, 0, 2, 3).reshape(ROWS, COLUMNS)


MOVES = {
    "nothing": lambda w: w,
    "a slice of whole groups": lambda w: w[4:12],
    "a slice from within a group": lambda w: w[2:6],
    "a slice that ends within a group": lambda w: w[4:10],
    "a slice of a slice": lambda w: w[2:14][2:10],
    "a slice of a slice within a group": lambda w: w[4:16][2:10],
    "every second row": lambda w: w[::2],
    "rows by number": lambda w: w[jnp.array(SHUFFLED)],
    "rows taken by number": lambda w: jnp.take(w, jnp.array(SHUFFLED), axis=0),
    "reversed": lambda w: w[::-1],
    "reversed groups": lambda w: w.reshape(4, 4, COLUMNS)[::-1].reshape(ROWS, COLUMNS),
    "rolled by a group": lambda w: jnp.roll(w, 4, 0),
    "rolled within groups": lambda w: jnp.roll(w, 2, 0),
    "interleaved": interleaved,
    "swapped tiles": swapped_tiles,
    "halves put together": lambda w: jnp.concatenate([w[8:], w[:8]]),
    "quarters of groups put together": lambda w: jnp.concatenate([w[1:], w[:1]]),
    "parts of a split": lambda w: jnp.concatenate(jnp.split(w, [4, 12])[::-1]),
    "uneven parts of a split": lambda w: jnp.concatenate(jnp.split(w, [6, 12])[::-1]),
    "padded by a group": lambda w: jnp.pad(w, ((4, 0), (0, 0))),
    "padded within a group": lambda w: jnp.pad(w, ((2, 2), (0, 0))),
    "a literal start": lambda w: lax.dynamic_slice(w, (4, 0), (8, COLUMNS)),
    "a literal start within a group": lambda w: lax.dynamic_slice(w, (3, 0), (8, COLUMNS)),
    "repeated rows": lambda w: jnp.repeat(w, 2, axis=0),
    "tiled": lambda w: jnp.tile(w, (2, 1)),
    "halves added": lambda w: w[:8] + w[8:],
    "there and back": lambda w: w.reshape(2, 8, 3, 4).reshape(ROWS, COLUMNS),
    "a slice of the columns": lambda w: w[:, 4:8],
    "a slice of the columns within a block": lambda w: w[:, 2:6],
    "shuffled columns": lambda w: w[:, jnp.array(SHUFFLED)],
    "blocks of columns put together": lambda w: jnp.concatenate([w[:, 4:], w[:, :4]], 1),
    "reversed columns of a masked weight": lambda w: jnp.where(w > 0, w, 0.5 * w)[:, ::-1],
    "added to its own reversal": lambda w: w + w[::-1],
    "added to its own shuffled columns": lambda w: w[:, :8] + w[:, jnp.array(SHUFFLED)],
    "a masked slice": lambda w: jnp.where(w[4:8] > 0, w[4:8], 2 * w[4:8]),
    "reversed within stretches of two": lambda w: w.reshape(8, 2, COLUMNS)[:, ::-1].reshape(
        ROWS, COLUMNS
    ),
}
PATTERNS = [("2:4", is_2_of_4), ("1x4@0.5", is_1_by_4)]
# Operands that have the pattern, though the reader refuses them. It does not add up the starts of
# slices, and does not count moves within a group. Sums of blocks are blocks, but more of them.
CAUTIOUS = {
    ("a slice of a slice", "2:4"),
    ("reversed within stretches of two", "2:4"),
    ("halves added", "1x4@0.5"),
    ("added to its own reversal", "1x4@0.5"),
}


@pytest.mark.parametrize(("pattern", "check"), PATTERNS)
@pytest.mark.parametrize("name", MOVES)
def test_a_weight_is_planned_if_the_operand_has_the_pattern(name, pattern, check):
    has_pattern = is_kept(MOVES[name], pattern, check)
    is_planned = plan_of(MOVES[name], pattern) is not None
    assert has_pattern == (is_planned or (name, pattern) in CAUTIOUS)


def random_move(draw, shape):
    """A move of the rows, as a function; every second one starts at multiples of 4."""
    unit = draw(st.sampled_from([1, 2, 4]))
    places = st.integers(0, shape[0] // unit).map(lambda place: place * unit)
    kind = draw(st.sampled_from(["slice", "swap", "roll", "step", "reverse", "transpose", "pad"]))
    if kind == "slice":
        start, end = sorted((draw(places), draw(places)))
        return (lambda w: w[start:end]) if end > start else (lambda w: w)
    if kind == "swap":
        place = draw(places)
        return lambda w: jnp.concatenate([w[place:], w[:place]])
    if kind == "roll":
        shift = draw(places)
        return lambda w: jnp.roll(w, shift, 0)
    if kind == "step":
        return lambda w: w[::2]
    if kind == "reverse":
        return lambda w: w[::-1]
    if kind == "pad":
        return lambda w: jnp.pad(w, ((unit, 0), (0, 0)))
    fits = draw(st.sampled_from([n for n in (1, 2, 4, 8) if shape[0] % (n * unit) == 0] or [0]))
    if not fits:
        return lambda w: w
    split = (fits, shape[0] // (fits * unit), unit)
    return lambda w: w.reshape(*split, -1).transpose(1, 0, 2, 3).reshape(w.shape)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_chain_of_moves_is_planned_without_the_pattern(data):
    steps, shape = [], (ROWS, COLUMNS)
    for _ in range(data.draw(st.integers(1, 3))):
        step = random_move(data.draw, shape)
        steps.append(step)
        shape = jax.eval_shape(step, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
        assume(shape[0] > 1)  # A single row is a vector to the reader.

    def move(w):
        for step in steps:
            w = step(w)
        return w

    if plan_of(move, "2:4") is not None:
        assert is_kept(move, "2:4", is_2_of_4)


def refusal(forward, params, *inputs, pattern="2:4"):
    with pytest.raises(ValueError, match="unknown axes") as error:
        nmjax.make_plan(params, pattern, forward=forward, inputs=inputs)
    return str(error.value).splitlines()[1]


def test_the_error_names_the_leaf_and_the_operation():
    def forward(params, x):
        return x @ params["fused"][2:6] + x @ params["whole"]

    params = {"fused": weight(0), "whole": weight(1, (4, COLUMNS))}
    assert refusal(forward, params, jnp.ones((2, 4))) == (
        "  fused (16, 12): the program breaks its groups of 4: "
        "a slice from entry 2 to 6 along axis -2"
    )


def test_a_start_that_the_program_computes():
    def forward(params, x, start):
        return x @ lax.dynamic_slice_in_dim(params["w"], start, 4)

    inputs = jnp.ones((2, 4)), jnp.int32(2)
    assert "a slice from a computed entry" in refusal(forward, {"w": weight(0)}, *inputs)


def test_each_of_several_products_counts():
    def forward(params, x):
        return x @ params["w"][:8] + x @ params["w"][6:14]

    assert "from entry 6 to 14" in refusal(forward, {"w": weight(0)}, jnp.ones((2, 8)))


def test_larger_groups_need_larger_steps():
    def forward(params, x):
        return x @ params["w"][4:12]

    inputs = {"w": weight(0)}, jnp.ones((2, 8))
    assert "groups of 8" in refusal(forward, *inputs, pattern="4:8")
    assert nmjax.make_plan(inputs[0], "1:2", forward=forward, inputs=inputs[1:])


def test_a_user_who_gives_the_axes_decides():
    def forward(params, x):
        return x @ params["w"][2:6]

    params, x = {"w": weight(0)}, jnp.ones((2, 4))
    plan = nmjax.make_plan(params, "2:4", forward=forward, inputs=(x,), axes={"w": -2})
    nmjax.check_axes(plan, forward, params, x)
    plan = nmjax.make_plan(params, "2:4", forward=forward, inputs=(x,), rules={"w": "1:2"})
    assert plan["w"].pattern == nmjax.NM(1, 2)


def test_layers_of_a_stack_may_be_picked_in_any_order():
    layers = jax.ShapeDtypeStruct((3, ROWS, ROWS), jnp.float32)

    def forward(params, x):
        for i in (2, 0, 1):
            x = jnp.tanh(x @ params["w"][i])
        backwards = params["w"][::-1]
        x = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, backwards)[0]
        return lax.cond(x.sum() > 0, lambda: x @ params["w"][0], lambda: x @ params["w"][1])

    for pattern in ("2:4", "1x4@0.5"):
        plan = nmjax.make_plan({"w": layers}, pattern, forward=forward, inputs=((2, ROWS),))
        assert plan["w"].reduction_axes == (-2,)


def test_fused_projections_are_sliced_along_their_outputs():
    def forward(params, x):
        q, k, v = jnp.split(params["qkv"], [6, 9], axis=1)
        return (x @ q).sum() + (x @ k).sum() + (x @ v).sum()

    plan = nmjax.make_plan({"qkv": weight(0)}, "2:4", forward=forward, inputs=((2, ROWS),))
    assert set(plan) == {"qkv"}


@pytest.mark.parametrize(("size", "is_planned"), [(16, True), (12, False)])
def test_shards_hold_whole_groups(size, is_planned):
    mesh = jax.sharding.AbstractMesh((2,), ("model",), (jax.sharding.AxisType.Auto,))

    def forward(params, x):
        return jax.shard_map(
            lambda w, x: lax.psum(x @ w, "model"),
            mesh=mesh,
            in_specs=(jax.P("model"), jax.P(None, "model")),
            out_specs=jax.P(),
        )(params["w"], x)

    plan = nmjax.make_plan(
        {"w": weight(0, (size, 8)), "dense": weight(0, (4, 4))},
        "2:4",
        forward=lambda p, x: (forward(p, x), x[:, :4] @ p["dense"]),
        inputs=((2, size),),
        on_unknown="dense",
    )
    assert ("w" in plan) == is_planned
    assert is_planned or "a shard" in plan.dense["w"]


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "4:8", "8:32"])
@pytest.mark.parametrize("how", ["times", "where", "straight-through"])
def test_masks_of_the_weight_itself_leave_its_groups_whole(pattern, how):
    """Masks rank slices of the weight against each other, but they only set entries to zero."""
    params = {"w": jax.random.normal(jax.random.key(0), (64, 8))}
    wanted = nmjax.make_plan(params, pattern, axes={"w": nmjax.Axes((-2,), (-1,))})

    def forward(params, x):
        w = params["w"]
        mask = nmjax.compute_masks(params, wanted)["w"]
        if how == "times":
            return x @ (w * mask.astype(w.dtype))
        return x @ (jnp.where(mask, w, 0) if how == "where" else nmjax.prune_ste(w, mask))

    plan = nmjax.make_plan(params, pattern, forward=forward, inputs=(jnp.ones((2, 64)),))
    assert plan == wanted
