"""Arrays of packed weights that were touched: refused wherever they are used, also as tracers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nmjax

PATTERNS = ["2:4", "4:8", "1x4@0.5", "1x4@0.5/layer"]
W = jnp.asarray(np.random.default_rng(0).normal(size=(16, 32)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 16)), jnp.float32)


def packed_weight(pattern, w=W):
    params = {"kernel": w}
    plan = nmjax.make_plan(params, pattern)
    return nmjax.pack(nmjax.prune(params, plan), plan)["kernel"]


def touched(packed, field, change):
    return dataclasses.replace(packed, **{field: change(getattr(packed, field))})


USES = {
    "packed_matmul": lambda packed: nmjax.packed_matmul(X, packed),
    "packed_matmul of xla": lambda packed: nmjax.packed_matmul(X, packed, implementation="xla"),
    "unpack": lambda packed: nmjax.unpack({"kernel": packed}),
    "nbytes": lambda packed: packed.nbytes,
    "least_nbytes": lambda packed: packed.least_nbytes,
    "sizes": lambda packed: nmjax.sizes({"kernel": packed}),
    "astype": lambda packed: packed.astype(jnp.bfloat16),
    "check_arrays": lambda packed: packed.check_arrays(),
    "check": lambda packed: jax.tree.map(np.asarray, packed).check(),
}
# Each array that says where the values are, and what maps over a tree do to it.
PLACES = {
    "2:4": ("codes",),
    "4:8": ("codes",),
    "1x4@0.5": ("indices",),
    "1x4@0.5/layer": ("indices", "row_pointers"),
}
DTYPES = ("bfloat16", "float32", "bool", "int8", "uint16", "int64")
CASES = [
    (pattern, field, dtype)
    for pattern, fields in PLACES.items()
    for field in fields
    for dtype in DTYPES
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("pattern", "field", "dtype"), CASES)
def test_places_of_another_dtype(use, pattern, field, dtype):
    packed = touched(packed_weight(pattern), field, lambda a: np.asarray(a).astype(dtype))
    with pytest.raises((TypeError, ValueError), match=rf"the {field} of Packed.* are {dtype}\("):
        USES[use](packed)


@pytest.mark.parametrize("use", ["packed_matmul", "packed_matmul of xla", "unpack", "nbytes"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_tree_that_was_cast_as_a_whole(use, pattern):
    packed = packed_weight(pattern)
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), packed)
    with pytest.raises(TypeError, match=r"bfloat16.*packed\.astype\(dtype\)"):
        USES[use](cast)
    with pytest.raises(TypeError, match=r"packed\.astype\(dtype\)"):
        jax.jit(lambda packed: USES[use](packed))(cast)


@pytest.mark.parametrize("use", ["packed_matmul", "unpack", "nbytes", "check"])
@pytest.mark.parametrize(
    ("pattern", "field", "change"),
    [
        ("2:4", "values", lambda a: a[:3]),
        ("2:4", "values", lambda a: a[:, :1]),
        ("2:4", "values", lambda a: a[..., :5]),
        ("2:4", "values", lambda a: a[..., :16]),
        ("2:4", "values", lambda a: a.reshape(8, 32)),
        ("2:4", "values", lambda a: jnp.zeros((0, 2, 32))),
        ("2:4", "codes", lambda a: a[:1]),
        ("2:4", "codes", lambda a: a.T),
        ("1x4@0.5", "values", lambda a: a[:, :4]),
        ("1x4@0.5", "values", lambda a: a[:3]),
        ("1x4@0.5", "values", lambda a: a[..., :2]),
        ("1x4@0.5", "indices", lambda a: a[:, :4]),
        ("1x4@0.5", "indices", lambda a: a[:4]),
        ("1x4@0.5/layer", "values", lambda a: a[:32]),
        ("1x4@0.5/layer", "indices", lambda a: a[:32]),
        ("1x4@0.5/layer", "row_pointers", lambda a: a[:-1]),
        ("1x4@0.5/layer", "row_pointers", lambda a: None),
        ("1x4@0.5", "row_pointers", lambda a: jnp.zeros(9, jnp.int32)),
    ],
)
def test_arrays_of_another_shape(use, pattern, field, change):
    packed = touched(packed_weight(pattern), field, change)
    with pytest.raises((ValueError, TypeError), match="Packed"):
        USES[use](packed)


@pytest.mark.parametrize("values", [np.int32, np.complex64, np.bool_])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_that_are_no_weights(pattern, values):
    packed = touched(packed_weight(pattern), "values", lambda a: np.asarray(a).astype(values))
    for use in ("packed_matmul", "unpack", "nbytes"):
        with pytest.raises(TypeError, match="should be floating"):
            USES[use](packed)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_no_array(pattern):
    packed = packed_weight(pattern)
    for field in (*PLACES[pattern], "values"):
        with pytest.raises(TypeError, match="Packed"):
            dataclasses.replace(packed, **{field: "text"}).check_arrays()


def over_two_devices(packed, product, spec):
    """A product in which each device has half of every array."""
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=jax.devices()[:2])
    specs = jax.tree.map(lambda _: spec, packed)
    return jax.shard_map(product, mesh=mesh, in_specs=(specs,), out_specs=P())(packed)


def test_a_mesh_that_cuts_what_belongs_together():
    product = lambda packed: nmjax.packed_matmul(X, packed)  # noqa: E731
    with pytest.raises(ValueError, match=r"\(8, 4, 4\) cannot hold .* expected .* 8, 8, 4\)"):
        over_two_devices(packed_weight("1x4@0.5"), product, P(None, "d"))
    layer = packed_weight("1x4@0.5/layer")
    with pytest.raises(ValueError, match=r"\(32, 4\) cannot hold .* expected \(\.\.\., 64, 4\)"):
        over_two_devices(dataclasses.replace(layer, row_pointers=None), product, P("d"))
    # 3 groups of 2 bits on each device.
    with pytest.raises(ValueError, match=r"3 of the 6 groups .* cuts a byte of the codes"):
        over_two_devices(packed_weight("1:4", jnp.ones((24, 32))), product, P("d"))


def test_a_mesh_that_cuts_the_inputs_between_bytes():
    packed = packed_weight("4:8")
    total = over_two_devices(
        packed, lambda part: jax.lax.psum(nmjax.packed_matmul(jnp.ones(8), part), "d"), P("d")
    )
    np.testing.assert_allclose(total, packed.unpack().sum(axis=0), atol=1e-5)


def test_a_shard_has_no_dense_form():
    for pattern, part in (("2:4", lambda a: a[..., :16]), ("1x4@0.5", lambda a: a[:4])):
        shard = jax.tree.map(part, packed_weight(pattern))
        shard.check_arrays()
        with pytest.raises(ValueError, match=r"shard of Packed.* 16 inputs and 16 outputs"):
            shard.unpack()


@pytest.mark.parametrize("pattern", ["2:4", "8:64", "1x4@0.5", "1x4@0.5/layer"])
def test_taps_are_not_a_stack(pattern):
    """Indexing every array takes a layer of a stack, and must not take a row of taps."""
    params = {"kernel": jnp.ones((3, 3, 64, 8)), "bias": jnp.ones(8)}
    plan = nmjax.make_plan(params, pattern)
    stack = {"kernel": jnp.ones((5, 3, 3, 64, 8)), "bias": jnp.ones((5, 8))}
    packed = nmjax.pack(nmjax.prune(stack, plan), plan)["kernel"]
    packed.check_arrays()
    layer = jax.tree.map(lambda a: a[0], packed)
    layer.check_arrays()
    images = jnp.ones((1, 4, 4, 64))
    assert nmjax.packed_conv(images, layer).shape == (1, 4, 4, 8)
    row = jax.tree.map(lambda a: a[0], layer)
    for use in (row.check_arrays, row.unpack, lambda: nmjax.packed_conv(images, row)):
        with pytest.raises(ValueError, match=r"cannot hold Packed"):
            use()
    if ":" in pattern:
        other = jax.tree.map(lambda a: a[:, :2], layer)
        with pytest.raises(ValueError, match=r"end with the taps \(3, 3\)"):
            jax.jit(lambda packed: packed.unpack())(other)


# Casts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_cast_changes_the_values_alone(pattern, dtype):
    packed = packed_weight(pattern)
    cast = packed.astype(dtype)
    assert cast.dtype == dtype
    np.testing.assert_array_equal(cast.unpack(), packed.unpack().astype(dtype))
    traced = jax.jit(lambda packed: packed.astype(dtype))(packed)
    jax.tree.map(np.testing.assert_array_equal, traced, cast)
    for field in PLACES[pattern]:
        assert getattr(cast, field) is getattr(packed, field)


def test_a_whole_tree_is_cast_as_the_error_says():
    params = {"layer": {"kernel": W, "bias": jnp.ones(32)}}
    plan = nmjax.make_plan(params, "2:4")
    packed = nmjax.pack(nmjax.prune(params, plan), plan)
    cast = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), packed, is_leaf=lambda x: hasattr(x, "astype")
    )
    assert {x.dtype for x in jax.tree.leaves(cast)} == {jnp.dtype("bfloat16"), jnp.dtype("uint8")}
    nmjax.unpack(cast)


@pytest.mark.parametrize("dtype", ["int8", "float4_e2m1fn", "float8_e8m0fnu", "complex64"])
def test_casts_to_what_weights_cannot_be(dtype):
    with pytest.raises(TypeError, match=f"got {dtype}"):
        packed_weight("2:4").astype(dtype)


# float8


@pytest.mark.one_in(4)
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_float8_weights_multiply(pattern, dtype, implementation):
    packed = packed_weight(pattern, W.astype(dtype))
    assert packed.dtype == dtype
    dense = np.asarray(nmjax.unpack(packed), np.float64)
    for x in (X, X.astype(jnp.bfloat16)):
        y = nmjax.packed_matmul(x, packed, implementation=implementation)
        assert y.dtype == x.dtype
        expected = np.asarray(x, np.float64) @ dense
        tolerance = 1e-4 if x.dtype == jnp.float32 else 5e-2
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=tolerance)


def test_float8_inputs_are_refused():
    with pytest.raises(TypeError, match=r"x must .*float8_e4m3fn.*cast"):
        nmjax.packed_matmul(X.astype(jnp.float8_e4m3fn), packed_weight("2:4"))


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
def test_a_dtype_without_a_zero_is_not_packed(pattern):
    packed = packed_weight(pattern)
    w = jnp.ones(packed.shape, jnp.float8_e8m0fnu)
    with pytest.raises(TypeError, match="a zero, got float8_e8m0fnu"):
        type(packed).pack(w, jnp.zeros(w.shape, bool), packed.leaf_plan)
