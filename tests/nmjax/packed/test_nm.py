"""Packed N:M weights, bit for bit, against a packing spelled out in plain Python."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax
from nmjax import NM, LeafPlan
from nmjax.packed.nm import PackedNM
from nmjax.pruning import leaf_mask
from tests.nmjax.float_bits import DTYPES, any_bits, bits_of

PATTERNS = [(1, 1), (1, 2), (2, 4), (3, 4), (4, 4), (1, 8), (4, 8), (3, 7), (5, 6), (1, 16)]
PATTERNS += [(8, 32), (5, 33), (16, 64), (1, 300)]


def mask_of(w, plan):
    return leaf_mask(w, plan, nmjax.magnitude)


def packed_of(w, plan):
    return PackedNM.pack(w, mask_of(w, plan), plan)


def on_host(packed):
    return jax.tree.map(np.asarray, packed)


def columns(x, plan):
    """Each column of inputs, as (stack and output index, list), by plain indexing."""
    x = np.asarray(x)
    reduced, outputs = plan.reduction_axes, plan.output_axes
    stack = [a for a in range(-x.ndim, 0) if a not in (*reduced, *outputs)]
    order = [*stack, *outputs, *reduced]
    moved = x.transpose([a + x.ndim for a in order])
    inputs = int(np.prod([x.shape[a] for a in reduced]))
    lead = moved.shape[: len(stack)]
    return moved.reshape(*lead, -1, inputs)


def spelled_out(mask, plan):
    """The codes as text of bits, column by column."""
    n, m = plan.pattern.n, plan.pattern.m
    width = (m - 1).bit_length()
    table = columns(mask, plan)
    codes = np.empty(table.shape[:-1], object)
    for index in np.ndindex(codes.shape):
        text = ""
        for group in table[index].reshape(-1, m):
            if n * width <= m:
                text += "".join(
                    f"{at:0{width}b}"[::-1] if width else "" for at in group.nonzero()[0]
                )
            else:
                text += "".join("1" if kept else "0" for kept in group)
        text += "0" * (-len(text) % 8)
        codes[index] = [int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8)]
    as_bytes = np.array(codes.tolist(), np.uint8).reshape(*codes.shape, -1)
    return as_bytes.swapaxes(-1, -2)


@st.composite
def weights(draw, dtypes=DTYPES):
    """Up to five axes in any roles; inputs that m divides, alone or taken together."""
    n, m = draw(st.sampled_from(PATTERNS))
    ndim = draw(st.integers(2, 4))
    axes = draw(st.permutations(range(-ndim, 0)))
    reduced = axes[: draw(st.integers(1, min(2, ndim - 1)))]
    outputs = axes[len(reduced) : len(reduced) + draw(st.integers(1, 2))]
    shape = [draw(st.integers(1, 3)) for _ in range(ndim)]
    factor = draw(st.sampled_from([d for d in range(1, m + 1) if m % d == 0]))
    shape[reduced[0]] *= factor
    shape[reduced[-1]] *= m // factor
    plan = LeafPlan(NM(n, m), tuple(reduced), tuple(outputs), tuple(shape))
    lead = draw(st.sampled_from([(), (2,)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return any_bits(rng, (*lead, *shape), draw(st.sampled_from(dtypes))), plan


@given(weights())
def test_packing_is_exact_and_as_documented(case):
    w, plan = case
    mask = mask_of(w, plan)
    packed = PackedNM.pack(w, mask, plan)
    assert (packed.shape, packed.dtype) == (w.shape, w.dtype)
    np.testing.assert_array_equal(bits_of(packed.unpack()), np.where(mask, bits_of(w), 0))
    np.testing.assert_array_equal(packed.codes, spelled_out(mask, plan))
    m, table = plan.pattern.m, columns(mask, plan)
    places = table.reshape(*table.shape[:-1], -1, m).nonzero()[-1]
    positions = np.moveaxis(np.asarray(packed.positions()), -1, -3)
    np.testing.assert_array_equal(positions.ravel(), places)
    kept = columns(bits_of(w), plan)[table]
    np.testing.assert_array_equal(np.moveaxis(bits_of(packed.values), -1, -3).ravel(), kept)
    PackedNM.check(on_host(packed))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_every_pattern(n, m):
    plan = LeafPlan(NM(n, m), (-2,), (-1,), (2 * m, 3))
    w = any_bits(np.random.default_rng(m), plan.shape, "bfloat16")
    mask = mask_of(w, plan)
    packed = PackedNM.pack(w, mask, plan)
    np.testing.assert_array_equal(bits_of(packed.unpack()), np.where(mask, bits_of(w), 0))
    np.testing.assert_array_equal(packed.codes, spelled_out(mask, plan))
    PackedNM.check(on_host(packed))


def test_float64():
    with jax.enable_x64(True):
        plan = LeafPlan(NM(2, 4), (-2,), (-1,), (8, 3))
        w = any_bits(np.random.default_rng(0), plan.shape, "float64")
        packed = packed_of(w, plan)
        expected = np.where(mask_of(w, plan), bits_of(w), 0)
        np.testing.assert_array_equal(bits_of(packed.unpack()), expected)


def test_a_dtype_of_half_bytes_is_refused():
    plan = LeafPlan(NM(2, 4), (-2,), (-1,), (8, 3))
    w = jnp.zeros(plan.shape, jnp.float4_e2m1fn)
    with pytest.raises(TypeError, match="float4_e2m1fn"):
        PackedNM.pack(w, jnp.zeros(plan.shape, bool), plan)


# Masks that keep fewer, or more


MATRIX = LeafPlan(NM(2, 4), (-2,), (-1,), (8, 3))
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)


@given(st.lists(st.booleans(), min_size=24, max_size=24))
def test_masks_that_keep_fewer(bits):
    mask = jnp.array(bits).reshape(8, 3) & mask_of(WEIGHTS, MATRIX)
    packed = PackedNM.pack(-WEIGHTS, mask, MATRIX)
    PackedNM.check(on_host(packed))
    np.testing.assert_array_equal(bits_of(packed.unpack()), bits_of(jnp.where(mask, -WEIGHTS, 0)))


@pytest.mark.not_under("jax_debug_nans")
def test_groups_that_keep_too_many_become_nan():
    mask = mask_of(WEIGHTS, MATRIX).at[:4, 1].set(True)
    dense = PackedNM.unpack(jax.jit(PackedNM.pack, static_argnums=2)(WEIGHTS, mask, MATRIX))
    assert jnp.isnan(dense[:4, 1]).sum() == 2
    assert not jnp.isnan(dense[4:]).any()
    assert not jnp.isnan(dense[:, [0, 2]]).any()


def test_misfits_are_counted():
    assert PackedNM.misfits(WEIGHTS != 0, MATRIX) == (6, 6)
    assert PackedNM.misfits(mask_of(WEIGHTS, MATRIX), MATRIX) == (0, 6)
    assert PackedNM.misfits(mask_of(WEIGHTS, MATRIX).at[:3, 1].set(True), MATRIX) == (1, 6)


# As a pytree node


def test_it_is_two_arrays_for_jax():
    packed = packed_of(WEIGHTS, MATRIX)
    leaves, structure = jax.tree.flatten(packed)
    assert [x.dtype for x in leaves] == ["float32", "uint8"]
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(PackedNM.unpack(again), packed.unpack())
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(packed)]
    assert names == [".values", ".codes"]
    twice = jax.tree.map(lambda x: x + x if x.dtype == jnp.float32 else x, packed)
    np.testing.assert_array_equal(PackedNM.unpack(twice), 2 * packed.unpack())
    moved = jax.device_put(packed, jax.devices()[1])
    assert moved.values.devices() == {jax.devices()[1]}
    np.testing.assert_array_equal(PackedNM.unpack(moved), packed.unpack())


def test_equal_plans_compile_once():
    traces = []

    @jax.jit
    def total(packed):
        traces.append(packed)
        return packed.unpack().sum()

    for _ in range(2):
        total(packed_of(WEIGHTS, dataclasses.replace(MATRIX)))
    assert len(traces) == 1


def test_stacks_are_mapped_and_scanned():
    stack = jnp.stack([WEIGHTS, 2 * WEIGHTS[::-1], -WEIGHTS])
    packed = packed_of(stack, MATRIX)
    mapped = jax.vmap(lambda w: packed_of(w, MATRIX))(stack)
    jax.tree.map(np.testing.assert_array_equal, packed, mapped)
    pruned = jnp.where(mask_of(stack, MATRIX), stack, 0)
    np.testing.assert_array_equal(jax.vmap(PackedNM.unpack)(packed), pruned)
    _, scanned = jax.lax.scan(lambda _, layer: (None, PackedNM.unpack(layer)), None, packed)
    np.testing.assert_array_equal(scanned, pruned)
    assert packed.shape == (3, 8, 3)
    assert jax.tree.map(lambda x: x[0], packed).shape == (8, 3)


def test_shapes_without_values():
    packed = jax.eval_shape(lambda w: packed_of(w, MATRIX), WEIGHTS)
    assert (packed.shape, packed.dtype) == ((8, 3), jnp.float32)
    assert packed.nbytes == packed_of(WEIGHTS, MATRIX).nbytes == 12 * 4 + 3
    assert jax.eval_shape(PackedNM.unpack, packed).shape == (8, 3)


# Small groups, large ones with positions, and large ones with a bitmask.
@pytest.mark.one_in(2)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(8, 64), NM(32, 64)], ids=str)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_outputs_may_be_sharded(axis_type, pattern):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    plan = LeafPlan(pattern, (-2,), (-1,), (128, 32))
    w = jnp.asarray(np.random.default_rng(0).normal(size=plan.shape), jnp.float32)
    sharding = NamedSharding(mesh, PartitionSpec(None, "d"))
    with jax.set_mesh(mesh):
        packed = jax.jit(lambda w: packed_of(w, plan))(jax.device_put(w, sharding))
        assert packed.values.sharding.spec[-1] == packed.codes.sharding.spec[-1] == "d"
        np.testing.assert_array_equal(packed.unpack(), jnp.where(mask_of(w, plan), w, 0))
        np.testing.assert_array_equal(jax.jit(PackedNM.unpack)(packed), packed.unpack())
        values = jax.grad(lambda packed: (packed.unpack() * w).sum(), allow_int=True)(packed).values
        np.testing.assert_array_equal(values, packed.values)


# Sizes


@pytest.mark.parametrize(
    ("pattern", "dtype", "ratio"),
    [
        ((2, 4), "bfloat16", 0.5625),
        ((2, 4), "float32", 0.53125),
        ((1, 4), "float32", 0.265625),
        ((1, 16), "bfloat16", 0.078125),
        ((4, 8), "bfloat16", 0.5625),
        ((8, 16), "float16", 0.5625),
    ],
)
def test_sizes_against_dense(pattern, dtype, ratio):
    plan = LeafPlan(NM(*pattern), (-2,), (-1,), (128, 16))
    packed = packed_of(jnp.ones(plan.shape, dtype), plan)
    assert packed.nbytes == ratio * packed.dtype.itemsize * 128 * 16


def test_least_size():
    packed = packed_of(jnp.ones((64, 64), jnp.bfloat16), LeafPlan(NM(2, 4), (-2,), (-1,), (64, 64)))
    assert packed.least_nbytes == 4096 + int(np.ceil(1024 * np.log2(6) / 8))


# What is refused


def forged(**changes):
    return dataclasses.replace(packed_of(WEIGHTS, MATRIX), **changes)


CODES = np.asarray(packed_of(WEIGHTS, MATRIX).codes)
RAGGED = LeafPlan(NM(2, 4), (-2,), (-1,), (4, 3))


@pytest.mark.parametrize(
    ("packed", "complaint"),
    [
        (forged(values=jnp.zeros((2, 3, 3))), "values of shape"),
        (forged(values=jnp.zeros((6, 3))), "values of shape"),
        (forged(leaf_plan=LeafPlan(NM(2, 4), (-2,), (-1,), (16, 3))), "values of shape"),
        (forged(leaf_plan=LeafPlan(NM(2, 5), (-2,), (-1,), (8, 3))), "not a multiple of 5"),
        (forged(codes=CODES[:, :2]), "expected uint8"),
        (forged(codes=CODES.astype(np.int8)), "expected uint8"),
        (forged(codes=np.zeros((1, 3), np.uint8)), "codes of 6 groups do not keep"),
        (forged(codes=CODES | 0b0000_0100 | 0b1), "groups do not keep"),
    ],
)
def test_what_pack_could_not_have_made(packed, complaint):
    with pytest.raises(ValueError, match=complaint):
        PackedNM.check(packed)


def test_unused_bits_and_wrong_bitmasks():
    w = WEIGHTS[:4]
    packed = packed_of(w, RAGGED)
    PackedNM.check(packed)
    with pytest.raises(ValueError, match="unused bits"):
        PackedNM.check(dataclasses.replace(packed, codes=np.asarray(packed.codes) | 0x80))
    plan = LeafPlan(NM(4, 8), (-2,), (-1,), (8, 3))
    packed = packed_of(WEIGHTS, plan)
    with pytest.raises(ValueError, match="1 groups do not keep 4 of 8"):
        PackedNM.check(dataclasses.replace(packed, codes=np.array([[0x0F, 0x1F, 0xF0]], np.uint8)))


def test_positions_beyond_the_group():
    plan = LeafPlan(NM(1, 3), (-2,), (-1,), (3, 1))
    packed = packed_of(WEIGHTS[:3, :1], plan)
    with pytest.raises(ValueError, match="1 groups do not keep 1 of 3"):
        PackedNM.check(dataclasses.replace(packed, codes=np.array([[3]], np.uint8)))


def test_another_pattern():
    with pytest.raises(TypeError, match="PackedNM does not hold weights with 1x"):
        PackedNM(WEIGHTS, WEIGHTS, dataclasses.replace(MATRIX, pattern="1x16@0.5")).positions()
