"""Compiled kernels with int8 values: exact against sums of integers by NumPy."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import NamedSharding, PartitionSpec

import nmjax
from nmjax.kernels.cpu.library import load_library
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


@pytest.mark.parametrize("cut", ["rows", "outputs"])
def test_parts_of_devices(cut):
    made, w = integers("1x4@0.5", (16, 64), 2)
    mesh = jax.make_mesh((4,), ("i",), devices=jax.devices()[:4],
                         axis_types=(jax.sharding.AxisType.Auto,))  # fmt: skip
    spec = {"rows": PartitionSpec("i", None), "outputs": PartitionSpec(None, "i")}[cut]
    x = np.random.default_rng(3).integers(-4, 5, (8, 16))
    with jax.set_mesh(mesh):
        multiply = jax.jit(
            lambda x, w: nmjax.packed_matmul(x, w, implementation="ffi"),
            out_shardings=NamedSharding(mesh, spec),
        )
        y = multiply(jnp.asarray(x, jnp.float32), made)
    np.testing.assert_array_equal(y, (x @ w) * np.asarray(made.scales))


def test_the_kernels_are_chosen():
    made, _ = integers("1x4@0.5", (16, 64), 2)
    text = jax.jit(nmjax.packed_matmul).lower(jnp.ones((1, 16)), made).as_text()
    assert "nmjax_blocks_int8" in text
    with pytest.raises(NotImplementedError, match="int8 values of 1xN blocks"):
        nmjax.packed_matmul(
            jnp.ones((1, 16)), integers("2:4", (16, 16), 0)[0], implementation="ffi"
        )
