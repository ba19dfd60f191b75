"""Products with packed N:M weights on TPUs: the kernel, run by Pallas' interpreter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax
from nmjax.kernels.tpu import decode
from tests.nmjax.packed_weights import prune_and_pack

PATTERNS = ("2:4", "1:4", "1:8", "4:8", "1:2", "3:6", "2:4/16")
# Compiled as a whole: operation by operation takes twice the time.
product = jax.jit(partial(decode.matmul, interpret=True), static_argnames="activation")
tile = jax.jit(nmjax.for_platform)


def weight(pattern, inputs, outputs, dtype=jnp.bfloat16, seed=0):
    """A packed matrix of small integers, with values of any dtype."""
    w = np.random.default_rng(seed).integers(-8, 9, (inputs, outputs))
    params = {"kernel": jnp.asarray(w, jnp.bfloat16)}
    plan = nmjax.make_plan(params, pattern)

    @jax.jit
    def pack(params):
        packed = prune_and_pack(params, plan)["kernel"]
        return packed.with_values(packed.values.astype(dtype))

    return pack(params)


def dense(packed):
    return np.asarray(packed.with_values(packed.values.astype(jnp.float32)).unpack(), np.float64)


def integers(rows, inputs, dtype=jnp.bfloat16, seed=1):
    x = np.random.default_rng(seed).integers(-8, 9, (rows, inputs))
    return jnp.asarray(x, dtype)


def assert_exact(x, packed, **arguments):
    """Sums of small integers are exact, so only the result is rounded."""
    y = product(x, tile(packed), **arguments)
    expected = np.asarray(x, np.float64) @ dense(packed)
    np.testing.assert_array_equal(y, jnp.asarray(expected).astype(y.dtype))


@pytest.mark.parametrize(
    ("pattern", "shape", "rows", "dtype"),
    [
        ("2:4", (200, 140), 3, jnp.float8_e5m2),
        pytest.param("1:8", (640, 100), 1, jnp.float8_e5m2, marks=pytest.mark.slow),
        pytest.param("2:4", (96, 20), 64, jnp.int8, marks=pytest.mark.slow),
        pytest.param("3:6", (36, 17), 2, jnp.bfloat16, marks=pytest.mark.slow),
        ("1:4", (16, 520), 257, jnp.bfloat16),  # two blocks of rows and of outputs
        pytest.param("5:8", (64, 16), 2, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("1:32", (64, 16), 2, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("1:4", (72, 130), 8, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("4:8", (64, 30), 5, jnp.float8_e4m3fn, marks=pytest.mark.slow),
        pytest.param("2:4/16", (128, 24), 4, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("2:4/3", (132, 24), 4, jnp.bfloat16, marks=pytest.mark.slow),
        # Two blocks of groups.
        pytest.param("2:4", (4 * 1040, 4), 2, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_products_are_exact(pattern, shape, rows, dtype):
    assert_exact(integers(rows, shape[0]), weight(pattern, *shape, dtype))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 12),
    st.integers(1, 140),
    st.integers(1, 64),
    st.sampled_from([jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2]),
    st.sampled_from([jnp.bfloat16, jnp.float32]),
)
def test_products_of_any_shape_are_exact(pattern, groups, outputs, rows, dtype, x_dtype):
    pattern = nmjax.parse_pattern(pattern)
    packed = weight(pattern, groups * pattern.run, outputs, dtype)
    try:
        decode.check(np.dtype(x_dtype), packed)
    except NotImplementedError:
        return
    assert_exact(integers(rows, groups * pattern.run, x_dtype), packed)


@pytest.mark.parametrize(
    ("dtype", "atol"), [pytest.param(jnp.bfloat16, 2e-5, marks=pytest.mark.slow), (jnp.int8, 5e-5)]
)
def test_float32_inputs_keep_their_precision(dtype, atol):
    x = jax.random.normal(jax.random.key(0), (3, 64), jnp.float32)
    packed = weight("2:4", 64, 16, dtype)
    y = product(x, tile(packed))
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ dense(packed), atol=atol)


def test_bias_activation_and_scales():
    packed, x, bias = weight("1:4", 64, 16), integers(2, 64), jnp.arange(16.0)
    expected = np.maximum(np.asarray(x, np.float64) @ dense(packed) + np.asarray(bias), 0)
    y = product(x, tile(packed), bias, "relu")
    np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.bfloat16))
    packed, scales = weight("1:4", 64, 16, jnp.int8), jnp.full(16, 0.5)
    y = product(x, tile(packed), bias, scales=scales)
    expected = np.asarray(x, np.float64) @ dense(packed) * 0.5 + np.asarray(bias)
    np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.bfloat16))


@pytest.mark.not_under("jax_debug_nans")
@pytest.mark.parametrize("dtype", [pytest.param(jnp.bfloat16, marks=pytest.mark.slow), jnp.int8])
def test_an_input_that_is_not_finite_makes_nan(dtype):
    x = integers(2, 64).at[0, 5].set(jnp.inf)
    y = product(x, tile(weight("2:4", 64, 16, dtype)))
    assert not np.isfinite(np.asarray(y[0], np.float32)).any()
    assert np.isfinite(np.asarray(y[1], np.float32)).all()


@pytest.mark.slow
def test_mapped_inputs_and_mapped_weights():
    packed, x = weight("2:4", 64, 16), jnp.stack([integers(2, 64), integers(2, 64, seed=2)])
    tiled = nmjax.for_platform(packed)
    expected = np.stack([product(part, tiled) for part in x])
    np.testing.assert_array_equal(jax.vmap(product, (0, None))(x, tiled), expected)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), tiled)
    np.testing.assert_array_equal(jax.vmap(product)(x, stack), expected)


@pytest.mark.slow
def test_shards_of_outputs_and_rows():
    mesh = jax.make_mesh((1, 2), ("rows", "outputs"), axis_types=(AxisType.Auto,) * 2)
    x, packed = integers(2, 64), weight("2:4", 64, 256)
    tiled = nmjax.for_platform(packed)
    specs = jax.tree.map(lambda a: PartitionSpec(*[None] * (a.ndim - 1), "outputs"), tiled)
    # Pallas' interpreter does not know manual axes; the compiler for TPUs does.
    mapped = jax.shard_map(
        product,
        mesh=mesh,
        in_specs=(PartitionSpec("rows"), specs),
        out_specs=PartitionSpec("rows", "outputs"),
        check_vma=False,
    )
    put = jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), tiled, specs)
    np.testing.assert_array_equal(jax.jit(mapped)(x, put), product(x, tiled))


@pytest.mark.parametrize(
    "specs",
    [
        ("rows", None, "outputs"),
        pytest.param((None, None, ("rows", "outputs")), marks=pytest.mark.slow),
        pytest.param((("rows", "outputs"), None, None), marks=pytest.mark.slow),
        # A sum over devices is XLA's.
        pytest.param((None, "rows", "outputs"), marks=pytest.mark.slow),
    ],
)
def test_explicit_axes_of_a_mesh(specs):
    rows, inputs, outputs = specs
    mesh = jax.make_mesh((2, 2), ("rows", "outputs"), axis_types=(AxisType.Explicit,) * 2)
    x, packed, bias = integers(4, 64), weight("2:4", 64, 32), jnp.arange(32.0, dtype=jnp.bfloat16)
    tiled = tile(packed)
    expected = np.asarray(x, np.float64) @ dense(packed) + np.arange(32.0)

    def put(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    sharded = jax.tree.map(lambda a: put(a, *[None] * (a.ndim - 1), outputs), tiled)
    with jax.set_mesh(mesh):
        operands = put(x, rows, inputs), sharded, put(bias)
        y = jax.jit(nmjax.packed_matmul)(*operands)
        np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.bfloat16))
        program = jax.jit(nmjax.packed_matmul).trace(*operands).lower(lowering_platforms=("tpu",))
        assert ("tpu_custom_call" in program.as_text()) == (inputs is None)
        if inputs is None:
            assert y.sharding.spec == PartitionSpec(rows, outputs)
            np.testing.assert_array_equal(product(*operands), y)


def test_the_platform_decides_when_the_program_is_lowered():
    packed, x = weight("2:4", 256, 128), integers(8, 256)
    tiled = nmjax.for_platform(packed)
    # For TPUs it calls the kernel, without a dense copy of the weight.
    traced = jax.jit(nmjax.packed_matmul).trace(x, tiled)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.slow
def test_other_platforms_unpack():
    packed, x = weight("2:4", 256, 128), integers(8, 256)
    tiled = nmjax.for_platform(packed)
    np.testing.assert_array_equal(x @ tiled, x @ packed)

    def loss(x, packed):
        return (x @ packed).astype(jnp.float32).sum()

    got, wanted = (jax.grad(loss, (0, 1), allow_int=True)(x, w) for w in (tiled, packed))
    np.testing.assert_array_equal(got[0], wanted[0])
    values = jnp.moveaxis(got[1].values, 0, 1)
    np.testing.assert_array_equal(values, wanted[1].values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            lambda x, w: (x.astype(jnp.float16), w),
            "bfloat16 or float32, not float16",
            marks=pytest.mark.not_under("jax_numpy_dtype_promotion"),
        ),
        pytest.param(
            lambda x, w: (x, w.astype(jnp.float32)),
            "cast them",
            marks=pytest.mark.not_under("jax_numpy_dtype_promotion"),
        ),
        (lambda x, w: (x, weight("1x4@0.5", 64, 16)), "128 outputs"),
        (lambda x, w: (x, weight("8:16", 64, 16)), "32 bits"),
        (
            lambda x, w: (
                x,
                nmjax.for_platform(weight("2:4", 64, 16, jnp.int8)).astype(jnp.bfloat16),
            ),
            "cast before",
        ),
    ],
)
def test_what_the_kernel_cannot_take(change, words):
    x, packed = change(integers(2, 64), weight("2:4", 64, 16))
    with pytest.raises(NotImplementedError, match=words):
        product(x, packed)
    # By default the product unpacks.
    assert jax.eval_shape(nmjax.packed_matmul, x, packed).shape == (2, 16)


def test_the_named_implementation_needs_a_tpu():
    with pytest.raises(NotImplementedError, match="not on a TPU"):
        nmjax.packed_matmul(integers(2, 64), weight("2:4", 64, 16), implementation="tpu")
    assert "not on a TPU" in nmjax.backends()["tpu"]
