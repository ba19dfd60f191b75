"""SAD, flip rate and density against brute force, and as a distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nmjax

SHAPES = st.dictionaries(
    st.text("abc/", min_size=1, max_size=4),
    st.sampled_from([(1,), (5,), (1, 4), (3, 2), (2, 3, 5)]),  # A program for each.
    min_size=1,
    max_size=4,
)


@st.composite
def mask_trees(draw, count):
    """`count` mask dicts over the same leaves."""
    shapes = draw(SHAPES)
    return [
        {name: draw(hnp.arrays(bool, shape)) for name, shape in shapes.items()}
        for _ in range(count)
    ]


@given(mask_trees(2))
def test_sad_counts_the_entries_that_differ(masks):
    a, b = masks
    expected = {
        name: sum(x != y for x, y in zip(a[name].flat, b[name].flat, strict=True)) for name in a
    }
    sad = nmjax.sad(a, b)
    assert {name: int(value) for name, value in sad.items()} == expected
    assert all(value.dtype == jnp.int32 and value.shape == () for value in sad.values())
    total = nmjax.total_sad(a, b)
    assert total.dtype == jnp.int32
    assert total == sum(expected.values())
    entries = sum(mask.size for mask in a.values())
    rate = nmjax.flip_rate(a, b)
    assert rate.dtype == jnp.float32
    np.testing.assert_allclose(rate, sum(expected.values()) / entries, rtol=1e-6)


@pytest.mark.parametrize("name", ["sad", "total_sad", "flip_rate"])
@pytest.mark.parametrize("second", [(), (None,)])
def test_a_second_set_of_masks_is_asked_for(name, second):
    call = rf"nmjax\.{name}\(nmjax\.compute_masks\(.*\), nmjax\.compute_masks\(.*\)\)"
    with pytest.raises(TypeError, match=f"^{name} compares two sets of masks: {call}"):
        getattr(nmjax, name)({"kernel": jnp.ones((4, 2))}, *second)


@given(mask_trees(3))
def test_sad_is_a_distance(masks):
    a, b, c = masks
    assert nmjax.sad(a, b) == nmjax.sad(b, a)
    assert nmjax.total_sad(a, a) == 0
    ab, bc, ac = nmjax.sad(a, b), nmjax.sad(b, c), nmjax.sad(a, c)
    assert all(ac[name] <= ab[name] + bc[name] for name in a)
    assert (nmjax.total_sad(a, b) == 0) == all((a[name] == b[name]).all() for name in a)


def test_a_swap_in_a_group_counts_two():
    weights = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    swapped = {"kernel": weights["kernel"].at[2].set(3.5)}
    plan = nmjax.make_plan(weights, "2:4")
    a, b = nmjax.compute_masks(weights, plan), nmjax.compute_masks(swapped, plan)
    assert nmjax.sad(a, b) == {"kernel": 2}
    assert nmjax.flip_rate(a, b) == 0.5


@given(mask_trees(1))
def test_density_is_the_share_of_true(masks):
    (a,) = masks
    density = nmjax.density(a)
    for name, mask in a.items():
        assert density[name].dtype == jnp.float32
        np.testing.assert_allclose(density[name], mask.mean(), rtol=1e-6)
    kept, entries = sum(m.sum() for m in a.values()), sum(m.size for m in a.values())
    np.testing.assert_allclose(nmjax.total_density(a), kept / entries, rtol=1e-6)


def test_totals_weigh_layers_by_their_size():
    a = {"small": np.ones((2, 2), bool), "large": np.zeros((6, 2), bool)}
    b = {"small": np.zeros((2, 2), bool), "large": np.zeros((6, 2), bool)}
    assert nmjax.total_density(a) == 0.25
    assert nmjax.flip_rate(a, b) == 0.25


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:8", "4:4"])
def test_density_of_a_plan_is_that_of_its_pattern(pattern):
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
    plan = nmjax.make_plan(params, pattern)
    density = nmjax.density(nmjax.compute_masks(params, plan))
    assert density["kernel"] == plan["kernel"].pattern.density


def test_under_jit_vmap_and_scan():
    key = jax.random.key(0)
    a = {"a": jax.random.bernoulli(key, 0.5, (3, 4, 4)), "b": jnp.ones((3, 2), bool)}
    b = jax.tree.map(jnp.logical_not, a)
    everything = jax.vmap(
        lambda a, b: (nmjax.sad(a, b), nmjax.total_sad(a, b), nmjax.flip_rate(a, b))
    )
    sad, total, rate = jax.jit(everything)(a, b)
    np.testing.assert_array_equal(sad["a"], [16, 16, 16])
    np.testing.assert_array_equal(total, [18, 18, 18])
    np.testing.assert_array_equal(rate, [1, 1, 1])
    np.testing.assert_array_equal(jax.jit(jax.vmap(nmjax.density))(a)["b"], [1, 1, 1])
    shares = jax.vmap(nmjax.total_density)(a) + jax.vmap(nmjax.total_density)(b)
    np.testing.assert_allclose(shares, 1, rtol=1e-6)

    def body(before, now):
        return now, nmjax.total_sad(before, now)

    first = jax.tree.map(lambda mask: mask[0], a)
    _, changes = jax.lax.scan(body, first, a)
    assert changes[0] == 0
    assert changes.dtype == jnp.int32


def test_more_entries_than_an_int32_counts():
    """Networks above 2**31 weights; shapes only, nothing is allocated."""
    masks = {"kernel": jax.ShapeDtypeStruct((2**16, 2**16), bool)}
    for share in (nmjax.total_density, lambda m: nmjax.flip_rate(m, m)):
        assert jax.eval_shape(share, masks).dtype == jnp.float32


def test_errors_name_the_leaf():
    a = {"layer/kernel": np.ones((4, 2), bool)}
    with pytest.raises(ValueError, match=r"layer/kernel.*\(2, 4\)"):
        nmjax.sad(a, {"layer/kernel": np.ones((2, 4), bool)})
    with pytest.raises(ValueError, match="layer/kernel"):
        nmjax.sad(a, {})
    with pytest.raises(ValueError, match="other"):
        nmjax.sad(a, {**a, "other": np.ones(2, bool)})
    weights = {"layer/kernel": np.ones((4, 2), np.float32)}
    for pair in ((a, weights), (weights, a)):
        with pytest.raises(TypeError, match=r"layer/kernel.*float32"):
            nmjax.sad(*pair)
        with pytest.raises(TypeError, match=r"layer/kernel.*float32"):
            nmjax.flip_rate(*pair)


STACK, ROWS, INPUTS, N = 2, 3, 5, 4
BLOCK_PLAN = nmjax.make_plan(
    {
        "conv": {"kernel": jnp.zeros((3, 3, INPUTS, ROWS * N))},
        "other": {"kernel": jnp.zeros((8, 4))},
    },
    f"1x{N}@0.5",
    rules={"other": "2:4"},
)


def block_masks(flags):
    """Masks of a stack of convolutions (stack, 3, 3, in, out), and of a layer of groups."""
    spread = np.repeat(flags.transpose(0, 2, 1), N, axis=-1)[:, None, None]
    conv = np.broadcast_to(spread, (STACK, 3, 3, INPUTS, ROWS * N))
    return {"conv/kernel": jnp.asarray(conv), "other/kernel": jnp.ones((8, 4), bool)}


@given(*(hnp.arrays(bool, (STACK, ROWS, INPUTS)) for _ in range(2)))
def test_blocks_of_each_row(before, after):
    masks = block_masks(after)
    counts = nmjax.blocks_per_row(masks, BLOCK_PLAN)
    assert list(counts) == ["conv/kernel"]
    np.testing.assert_array_equal(counts["conv/kernel"], after.sum(axis=-1))
    fewest, most = nmjax.row_balance(masks, BLOCK_PLAN)["conv/kernel"]
    assert (fewest, most) == (after.sum(axis=-1).min(), after.sum(axis=-1).max())
    regrown = nmjax.blocks_regrown(block_masks(before), masks, BLOCK_PLAN)
    assert {name: int(count) for name, count in regrown.items()} == {
        "conv/kernel": sum(
            now and not then for now, then in zip(after.flat, before.flat, strict=True)
        )
    }


def test_density_of_what_is_no_mask():
    for measure in (nmjax.density, nmjax.total_density):
        with pytest.raises(TypeError, match=r"layer/kernel has dtype float32.*True = kept"):
            measure({"layer/kernel": np.full((4, 2), 2.0, np.float32)})


def test_masks_of_blocks_that_do_not_fit_are_named():
    masks = block_masks(np.ones((STACK, ROWS, INPUTS), bool))
    other = {**masks, "conv/kernel": jnp.ones((3, 3, INPUTS, 2 * ROWS * N), bool)}
    with pytest.raises(
        ValueError, match=r"conv/kernel: planned as \(3, 3, 5, 12\), got \(3, 3, 5, 24\)"
    ):
        nmjax.row_balance(other, BLOCK_PLAN)
    with pytest.raises(TypeError, match="conv/kernel has dtype int32"):
        nmjax.blocks_per_row(
            {**masks, "conv/kernel": masks["conv/kernel"].astype(np.int32)}, BLOCK_PLAN
        )


def test_a_missing_mask_of_blocks_is_named():
    with pytest.raises(ValueError, match="conv/kernel"):
        nmjax.blocks_per_row({}, BLOCK_PLAN)
