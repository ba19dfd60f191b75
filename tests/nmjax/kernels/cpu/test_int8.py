"""Compiled kernels with int8 values: exact against sums of integers by NumPy."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import NamedSharding, PartitionSpec

import nmjax
from nmjax.kernels.cpu.library import load_library
from nmjax.kernels.matmul import choose
from tests.nmjax.packed_weights import prune_and_pack

pytestmark = pytest.mark.skipif(
    load_library().instruction_set is None, reason=f"no kernels: {load_library().reason}"
)

MATRICES = {
    "1x16@0.75": (64, 80),
    "1x4@0.5": (37, 20),
    "1x8@0.25/layer": (300, 24),
    "1x20@0.5": (9, 40),
    "1x64@0.8": (40, 128),
}


def integers(pattern, shape, seed):
    """A quantized weight whose scales are powers of two, and its integers (*shape,) as int64."""
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=shape).astype(np.float32)}
    axes = nmjax.Axes((-2,), (-1,), tuple(range(-len(shape), -2)))
    plan = nmjax.make_plan(params, pattern, axes={"w": axes})
    made = nmjax.quantize(prune_and_pack(params, plan))["w"]
    scales = jnp.asarray(2.0 ** rng.integers(-3, 4, shape[-1]), jnp.float32)
    made = nmjax.Quantized(made.packed, scales, made.weight_dtype)
    values = made.packed.with_values(made.values.astype(jnp.float32))
    return made, np.asarray(values.unpack()).astype(np.int64)


@given(
    st.sampled_from(sorted(MATRICES)),
    st.sampled_from([1, 2, 5, 9, 40, 300]),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_products(pattern, rows, dtype, finish, seed):
    made, w = integers(pattern, MATRICES[pattern], seed)
    rng = np.random.default_rng(seed)
    x = rng.integers(-4, 5, (rows, w.shape[0]))
    bias = rng.integers(-9, 10, w.shape[1]) if finish else None
    expected = (x @ w) * np.asarray(made.scales, np.float64) + (0 if bias is None else bias)
    expected = np.maximum(expected, 0) if finish else expected
    y = nmjax.packed_matmul(
        jnp.asarray(x, dtype),
        made,
        None if bias is None else jnp.asarray(bias, jnp.float32),
        activation="relu" if finish else None,
        implementation="ffi",
    )
    np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.float32).astype(dtype))


def rounded(x):
    """Integers and steps of each row, by the formula."""
    steps = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    steps = np.where(steps == 0, np.float32(1), steps)
    return np.round(x / steps).astype(np.int64), steps


@given(
    st.sampled_from(sorted(MATRICES)),
    st.sampled_from([1, 3, 8, 40, 70, 300]),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_rounded_inputs(pattern, rows, dtype, finish, seed):
    """Scales are powers of two, so that only the sums of integers can be wrong."""
    made, w = integers(pattern, MATRICES[pattern], seed)
    made = dataclasses.replace(made, inputs_are="dynamic")
    rng = np.random.default_rng(seed)
    q = rng.integers(-127, 128, (rows, w.shape[0]))
    q[:, 0] = 127  # Steps are exact then.
    steps = 2.0 ** rng.integers(-3, 4, (rows, 1))
    bias = rng.integers(-9, 10, w.shape[1]) if finish else None
    expected = (q @ w) * steps * np.asarray(made.scales, np.float64)
    expected = np.maximum(expected + bias, 0) if finish else expected
    y = nmjax.packed_matmul(
        jnp.asarray(q * steps, dtype),
        made,
        None if bias is None else jnp.asarray(bias, jnp.float32),
        activation="relu" if finish else None,
        implementation="ffi",
    )
    np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.float32).astype(dtype))


def test_any_inputs_are_rounded_as_defined():
    made, w = integers("1x4@0.5", (37, 20), 5)
    made = dataclasses.replace(made, inputs_are="dynamic")
    x = np.random.default_rng(6).normal(size=(11, 37)).astype(np.float32)
    x[3] = 0
    q, steps = rounded(x)
    expected = (q @ w) * steps * np.asarray(made.scales)
    for implementation in ("ffi", "xla"):
        y = nmjax.packed_matmul(jnp.asarray(x), made, implementation=implementation)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    grad = jax.grad(lambda x: nmjax.packed_matmul(x, made).sum())(jnp.asarray(x))
    sums = np.asarray(made.unpack()).sum(axis=1)
    np.testing.assert_allclose(grad, np.tile(sums, (11, 1)), rtol=1e-4, atol=1e-4)
    mapped = jax.vmap(lambda x: nmjax.packed_matmul(x, made))(jnp.asarray(x))
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_largest_sums_fit():
    """Every product is 127 * 127 or its negative, of as many inputs as there may be."""
    inputs = 2**17
    plan = nmjax.LeafPlan(nmjax.Block1xN(16, 0.0), (-2,), (-1,), (inputs, 16))
    values = np.full((1, inputs, 16), 127, np.int8)
    values[..., 1::2] = -127
    packed = nmjax.PackedBlocks(
        jnp.asarray(values), jnp.arange(inputs, dtype=jnp.uint32)[None], None, plan
    )
    made = nmjax.Quantized(packed, jnp.ones(16), np.dtype(np.float32), "dynamic")
    for rows in (1, 9):
        y = nmjax.packed_matmul(jnp.full((rows, inputs), 127.0), made, implementation="ffi")
        expected = 127 * 127 * inputs
        np.testing.assert_array_equal(y, np.tile([expected, -expected], (rows, 8)))


@pytest.mark.not_under("jax_debug_nans")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("implementation", ["ffi", "xla"])
def test_rows_that_are_not_finite_make_nan(bad, implementation):
    made, _ = integers("1x4@0.5", (37, 20), 5)
    made = dataclasses.replace(made, inputs_are="dynamic")
    x = np.ones((3, 37), np.float32)
    x[1, 4] = bad
    y = nmjax.packed_matmul(jnp.asarray(x), made, implementation=implementation)
    assert np.isnan(y).all(axis=1).tolist() == [False, True, False]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("taps", "strides"), [((3, 3), 1), ((2, 3), 2), ((1, 1), 1)])
def test_convolutions(taps, strides):
    made, w = integers("1x8@0.5", (*taps, 12, 24), 0)
    x = np.random.default_rng(1).integers(-9, 10, (2, 7, 6, 12))
    y = nmjax.packed_conv(
        jnp.asarray(x, jnp.float32), made, strides=strides, padding="VALID", implementation="ffi"
    )
    height, width = y.shape[1:3]
    expected = sum(
        x[:, i:, j:][:, ::strides, ::strides][:, :height, :width] @ w[i, j]
        for i, j in np.ndindex(*taps)
    )
    np.testing.assert_array_equal(y, expected * np.asarray(made.scales))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("inputs", ["float", "dynamic"])
@pytest.mark.parametrize("cut", ["rows", "outputs"])
def test_parts_of_devices(cut, inputs):
    made, w = integers("1x4@0.5", (16, 64), 2)
    mesh = jax.make_mesh((4,), ("i",), devices=jax.devices()[:4],
                         axis_types=(jax.sharding.AxisType.Auto,))  # fmt: skip
    spec = {"rows": PartitionSpec("i", None), "outputs": PartitionSpec(None, "i")}[cut]
    x = np.random.default_rng(3).integers(-4, 5, (8, 16))
    made = dataclasses.replace(made, inputs_are=inputs)
    if inputs == "dynamic":
        x[:, 0] = 127
    with jax.set_mesh(mesh):
        multiply = jax.jit(
            lambda x, w: nmjax.packed_matmul(x, w, implementation="ffi"),
            out_shardings=NamedSharding(mesh, spec),
        )
        y = multiply(jnp.asarray(x, jnp.float32), made)
    np.testing.assert_array_equal(y, (x @ w) * np.asarray(made.scales))


def test_the_kernels_are_chosen():
    made, _ = integers("1x4@0.5", (16, 64), 2)
    if load_library().instruction_set != "portable":
        text = jax.jit(nmjax.packed_matmul).lower(jnp.ones((1, 16)), made).as_text()
        assert "nmjax_blocks_int8" in text
        assert choose(made.dtype, made, 1).reason.endswith("kept, int8 weights")
        rounding = dataclasses.replace(made, inputs_are="dynamic")
        assert choose(made.dtype, rounding, 1).reason.endswith("int8 by int8")
    with pytest.raises(NotImplementedError, match="int8 values of 1xN blocks"):
        nmjax.packed_matmul(
            jnp.ones((1, 16)), integers("2:4", (16, 16), 0)[0], implementation="ffi"
        )
