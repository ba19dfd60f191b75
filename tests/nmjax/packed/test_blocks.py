"""Packed blocks, bit for bit, against a packing spelled out block by block."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax
from nmjax import NM, Block1xN, LeafPlan
from nmjax.packed.blocks import PackedBlocks
from nmjax.pruning import leaf_mask
from tests.nmjax.float_bits import DTYPES, any_bits, bits_of


def mask_of(w, plan):
    return leaf_mask(w, plan, nmjax.magnitude)


def packed_of(w, plan):
    return PackedBlocks.pack(w, mask_of(w, plan), plan)


def on_host(packed):
    return jax.tree.map(np.asarray, packed)


def matrices(x, plan):
    """The weight as (stack, outputs, inputs, taps)."""
    x = np.asarray(x)
    spans = [plan.output_axes, plan.reduction_axes, plan.tap_axes]
    named = [a for span in spans for a in span]
    stack = [a for a in range(-x.ndim, 0) if a not in named]
    sizes = [math.prod(x.shape[a] for a in span) for span in (stack, *spans)]
    return x.transpose([a + x.ndim for a in (*stack, *named)]).reshape(sizes)


def spelled_out(w, mask, plan):
    """For each matrix the list of rows, each a list of (input, values of the block)."""
    n, found = plan.pattern.n, []
    for weights, kept in zip(matrices(w, plan), matrices(mask, plan), strict=True):
        rows = []
        for first in range(0, len(weights), n):
            inside = kept[first : first + n].any(axis=(0, 2))
            block = weights[first : first + n]
            rows.append([(i, block[:, i].T.ravel()) for i in inside.nonzero()[0]])
        found.append(rows)
    return found


@st.composite
def weights(draw):
    """Up to five axes in any roles, with outputs that n divides."""
    n = draw(st.integers(1, 5))
    ndim = draw(st.integers(2, 4))
    axes = list(draw(st.permutations(range(-ndim, 0))))
    outputs = [axes.pop() for _ in range(draw(st.integers(1, min(2, ndim - 1))))]
    inputs = [axes.pop()]
    taps = [axes.pop() for _ in range(draw(st.integers(0, len(axes))))]
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    shape[outputs[-1]] *= n
    pattern = Block1xN(n, draw(st.sampled_from([0.0, 0.3, 0.5, 0.9])), draw(st.booleans()))
    plan = LeafPlan(pattern, tuple(inputs), tuple(outputs), tuple(shape), tuple(taps))
    lead = draw(st.sampled_from([(), (2,)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return any_bits(rng, (*lead, *shape), draw(st.sampled_from(DTYPES))), plan


@given(weights())
def test_packing_is_exact_and_as_documented(case):
    w, plan = case
    mask = mask_of(w, plan)
    packed = PackedBlocks.pack(w, mask, plan)
    assert (packed.shape, packed.dtype) == (w.shape, w.dtype)
    np.testing.assert_array_equal(bits_of(packed.unpack()), np.where(mask, bits_of(w), 0))
    expected = spelled_out(bits_of(w), mask, plan)
    blocks = [block for rows in expected for row in rows for block in row]
    np.testing.assert_array_equal(packed.indices.ravel(), [i for i, _ in blocks])
    np.testing.assert_array_equal(
        bits_of(packed.values).ravel(), np.concatenate([values for _, values in blocks])
    )
    if plan.pattern.uniform:
        assert packed.row_pointers is None
    else:
        counts = [[len(row) for row in rows] for rows in expected]
        pointers = np.asarray(packed.row_pointers).reshape(len(expected), -1)
        np.testing.assert_array_equal(np.diff(pointers), counts)
        assert (pointers[:, 0] == 0).all()
    PackedBlocks.check(on_host(packed))


UNIFORM = LeafPlan(Block1xN(2, 0.5), (-2,), (-1,), (6, 4))
LAYER = LeafPlan(Block1xN(2, 0.5, uniform=False), (-2,), (-1,), (6, 4))
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)


@pytest.mark.parametrize(("inputs", "dtype"), [(256, "uint8"), (257, "uint16"), (65537, "uint32")])
def test_indices_are_as_narrow_as_they_can_be(inputs, dtype):
    plan = LeafPlan(Block1xN(2, 0.9), (-2,), (-1,), (inputs, 2))
    w = jnp.ones(plan.shape, jnp.bfloat16).at[-1].set(2.0)
    packed = packed_of(w, plan)
    assert packed.indices.dtype == dtype
    assert packed.indices[0, -1] == inputs - 1
    np.testing.assert_array_equal(packed.unpack(), jnp.where(mask_of(w, plan), w, 0))


# Masks that keep fewer, or more


@given(st.lists(st.booleans(), min_size=24, max_size=24), st.sampled_from([UNIFORM, LAYER]))
def test_masks_that_keep_fewer(bits, plan):
    mask = jnp.array(bits).reshape(6, 4) & mask_of(WEIGHTS, plan)
    packed = PackedBlocks.pack(-WEIGHTS, mask, plan)
    PackedBlocks.check(on_host(packed))
    expected = jnp.where(mask, -WEIGHTS, 0)
    np.testing.assert_array_equal(bits_of(packed.unpack()), bits_of(expected))


@pytest.mark.not_under("jax_debug_nans")
def test_rows_that_keep_too_many_become_nan():
    mask = mask_of(WEIGHTS, UNIFORM).at[:, :2].set(True)
    packed = jax.jit(PackedBlocks.pack, static_argnums=2)(WEIGHTS, mask, UNIFORM)
    dense = packed.unpack()
    assert jnp.isnan(dense[:, :2]).sum() == 6
    assert not jnp.isnan(dense[:, 2:]).any()
    assert jnp.isnan(PackedBlocks.unpack(PackedBlocks.pack(WEIGHTS, mask, LAYER))).sum() == 12


def test_misfits_are_counted():
    assert PackedBlocks.misfits(WEIGHTS != 0, UNIFORM) == (6, 12)
    assert PackedBlocks.misfits(mask_of(WEIGHTS, UNIFORM), UNIFORM) == (0, 12)
    # One row keeps all 6 inputs, the other none: 3 too many for a row, none for the layer.
    one_row = jnp.zeros((6, 4), bool).at[:, 1].set(True)
    assert PackedBlocks.misfits(one_row, UNIFORM) == (3, 12)
    assert PackedBlocks.misfits(one_row, LAYER) == (0, 12)
    assert PackedBlocks.misfits(one_row.at[2, 3].set(True), LAYER) == (1, 12)


# As a pytree node


@pytest.mark.parametrize("plan", [UNIFORM, LAYER])
def test_it_is_its_arrays_for_jax(plan):
    packed = packed_of(WEIGHTS, plan)
    leaves, structure = jax.tree.flatten(packed)
    assert [x.dtype for x in leaves] == ["float32", "uint8"] + ["int32"] * (plan is LAYER)
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(PackedBlocks.unpack(again), packed.unpack())
    moved = jax.device_put(packed, jax.devices()[1])
    np.testing.assert_array_equal(PackedBlocks.unpack(moved), packed.unpack())


@pytest.mark.parametrize("plan", [UNIFORM, LAYER])
def test_stacks_are_mapped_and_scanned(plan):
    stack = jnp.stack([WEIGHTS, 2 * WEIGHTS[::-1], -WEIGHTS])
    packed = packed_of(stack, plan)
    mapped = jax.vmap(lambda w: packed_of(w, plan))(stack)
    jax.tree.map(np.testing.assert_array_equal, packed, mapped)
    pruned = jnp.where(mask_of(stack, plan), stack, 0)
    np.testing.assert_array_equal(packed.unpack(), pruned)
    np.testing.assert_array_equal(jax.vmap(PackedBlocks.unpack)(packed), pruned)
    _, scanned = jax.lax.scan(lambda _, layer: (None, PackedBlocks.unpack(layer)), None, packed)
    np.testing.assert_array_equal(scanned, pruned)
    assert packed.shape == (3, 6, 4)


@pytest.mark.parametrize("plan", [UNIFORM, LAYER])
def test_shapes_without_values(plan):
    packed = jax.eval_shape(lambda w: packed_of(w, plan), WEIGHTS)
    assert (packed.shape, packed.dtype) == ((6, 4), jnp.float32)
    assert packed.nbytes == packed_of(WEIGHTS, plan).nbytes == 6 * (8 + 1) + 12 * (plan is LAYER)
    assert jax.eval_shape(PackedBlocks.unpack, packed).shape == (6, 4)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_rows_may_be_sharded(axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    plan = LeafPlan(Block1xN(2, 0.5), (-2,), (-1,), (16, 32))
    w = jnp.asarray(np.random.default_rng(0).normal(size=plan.shape), jnp.float32)
    sharding = NamedSharding(mesh, PartitionSpec(None, "d"))
    expected = jnp.where(mask_of(w, plan), w, 0)
    with jax.set_mesh(mesh):
        mask = jax.device_put(mask_of(w, plan), sharding)
        packed = jax.jit(PackedBlocks.pack, static_argnums=2)(
            jax.device_put(w, sharding), mask, plan
        )
        assert packed.values.sharding.spec[0] == packed.indices.sharding.spec[0] == "d"
        np.testing.assert_array_equal(packed.unpack(), expected)


# Sizes


@pytest.mark.parametrize("uniform", [True, False])
def test_size_against_dense(uniform):
    """1x16 blocks at 90 % take at most 0.105 of dense float32."""
    plan = LeafPlan(Block1xN(16, 0.9, uniform), (-2,), (-1,), (1000, 256))
    packed = packed_of(jnp.ones(plan.shape, jnp.float32), plan)
    assert packed.nbytes == 16 * 100 * (16 * 4 + 2) + (0 if uniform else 17 * 4)
    assert packed.nbytes <= 0.105 * 4 * 1000 * 256


def test_least_size():
    packed = packed_of(WEIGHTS, UNIFORM)
    assert packed.least_nbytes == 6 * 8 + math.ceil(2 * math.log2(math.comb(6, 3)) / 8)
    assert packed_of(WEIGHTS, LAYER).least_nbytes == 48 + math.ceil(math.log2(math.comb(12, 6)) / 8)


# What is refused


HOST_UNIFORM, HOST_LAYER = on_host(packed_of(WEIGHTS, UNIFORM)), on_host(packed_of(WEIGHTS, LAYER))


def forged(packed, **changes):
    return dataclasses.replace(packed, **changes)


def pointers(*numbers):
    return forged(HOST_LAYER, row_pointers=np.array(numbers, np.int32))


def indices(*numbers):
    return forged(HOST_UNIFORM, indices=np.array(numbers, np.uint8).reshape(2, 3))


@pytest.mark.parametrize(
    ("packed", "complaint"),
    [
        (forged(HOST_UNIFORM, values=np.zeros((2, 2, 2))), "values of shape"),
        (forged(HOST_UNIFORM, values=np.zeros((12,))), "values of shape"),
        (forged(HOST_LAYER, values=np.zeros((2, 6, 2))), "expected uint8"),
        (
            forged(HOST_UNIFORM, leaf_plan=dataclasses.replace(UNIFORM, shape=(6, 5))),
            "5 outputs are not a multiple of 2",
        ),
        (forged(HOST_UNIFORM, indices=np.zeros((2, 3), np.uint16)), "expected uint8"),
        (forged(HOST_UNIFORM, indices=np.zeros((3, 2), np.uint8)), "expected uint8"),
        (indices(0, 1, 6, 0, 1, 2), "beyond 6 inputs"),
        (indices(0, 1, 1, 0, 1, 2), "not ascending"),
        (indices(0, 2, 1, 0, 1, 2), "not ascending"),
        (pointers(0, 3, 5), "do not ascend from 0 to 6"),
        (pointers(1, 3, 6), "do not ascend from 0 to 6"),
        (pointers(0, 7, 6), "do not ascend from 0 to 6"),
        (pointers(0, -1, 6), "do not ascend from 0 to 6"),
        (pointers(-(2**31), 2**31 - 1, 6), "do not ascend from 0 to 6"),
        (pointers(0, 6), "expected int32"),
        (pointers(0, 0, 6), "not ascending"),
    ],
)
def test_what_pack_could_not_have_made(packed, complaint):
    with pytest.raises(ValueError, match=complaint):
        PackedBlocks.check(packed)


def test_another_pattern():
    with pytest.raises(TypeError, match="PackedBlocks does not hold weights with 2:4"):
        PackedBlocks.unpack(
            PackedBlocks(WEIGHTS, WEIGHTS, None, dataclasses.replace(UNIFORM, pattern=NM(2, 4)))
        )
