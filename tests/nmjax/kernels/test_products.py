"""Every implementation of a product with packed weights, against NumPy in float64."""

import concurrent.futures
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from jax.sharding import AxisType, PartitionSpec

import nmjax
from nmjax.kernels import build, matmul
from nmjax.kernels.cpu.library import load_library
from nmjax.kernels.operands import as_window
from tests.nmjax.packed_weights import prune_and_pack

KERNELS = pytest.mark.skipif(
    load_library().instruction_set is None, reason=f"no kernels: {load_library().reason}"
)
ELSEWHERE = ("decode", "cusparselt", "tpu")
NAMED = ["xla", pytest.param("ffi", marks=KERNELS)]
IMPLEMENTATIONS = [None, *NAMED]
# A new implementation joins by its row in the table.
TABLE = [
    pytest.param(
        name, marks=pytest.mark.skipif(name in ELSEWHERE, reason="runs on GPUs or TPUs only")
    )
    for name in matmul.IMPLEMENTATIONS
]
DTYPES = [jnp.float32, jnp.bfloat16]


def packed_weight(shape, pattern, dtype=jnp.float32, seed=0):
    w = np.random.default_rng(seed).normal(size=shape)
    params = {"layer": {"kernel": jnp.asarray(w, dtype)}}
    axes = nmjax.Axes((-2,), (-1,), tuple(range(-len(shape), -2)))
    plan = nmjax.make_plan(params, pattern, axes={"kernel": axes})
    assert plan, plan.dense
    return prune_and_pack(params, plan)["layer"]["kernel"]


def numbers(shape, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def exact(x):
    return np.asarray(x, np.float64)


def assert_near(actual, expected, dtype):
    """To the rounding of the dtype, in units of the largest result."""
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    scale = max(np.abs(expected).max(initial=0), 1e-3)
    assert actual.shape == expected.shape
    assert np.abs(exact(actual) - expected).max(initial=0) <= tolerance * scale


@st.composite
def matmuls(draw):
    if draw(st.booleans()):
        n = draw(st.sampled_from([4, 8, 12, 16, 32, 64]))
        sparsity = draw(st.sampled_from([0.0, 0.3, 0.5, 0.75, 0.9]))
        where = draw(st.sampled_from(["", "/layer"]))
        pattern, m = f"1x{n}@{sparsity}{where}", 1
        outputs = n * draw(st.integers(1, 6))
    else:
        pattern = draw(st.sampled_from(["2:4", "1:4", "3:4", "1:2", "4:8", "2:8", "1:16", "2:5"]))
        pattern = draw(st.sampled_from([pattern, "7:12", "8:32", "1:3", "20:32"]))
        m = int(pattern.split(":")[1])
        outputs = 16 * draw(st.integers(1, 6))
    inputs = draw(st.integers(2, 70)) if m == 1 else m * draw(st.integers(1, 20))
    batch = draw(st.sampled_from([0, 1, 2, 3, 8, 9, 16, 17, 33, 70, 130, 300]))
    x_dtype, w_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    if jax.config.jax_numpy_dtype_promotion == "strict":  # Then a product promotes nothing.
        x_dtype = w_dtype
    return pattern, batch, inputs, outputs, x_dtype, w_dtype


def takes(implementation, x, packed):
    """Whether an implementation takes these operands; None always finds one that does."""
    try:
        if implementation is not None:
            matmul.IMPLEMENTATIONS[implementation].check(x.dtype, packed, len(x))
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("implementation", TABLE)
@given(case=matmuls(), relu=st.booleans(), with_bias=st.booleans())
def test_matmul_is_a_product_with_the_unpacked_weight(implementation, case, relu, with_bias):
    pattern, batch, inputs, outputs, x_dtype, w_dtype = case
    packed = packed_weight((inputs, outputs), pattern, w_dtype)
    x = numbers((batch, inputs), x_dtype)
    bias = numbers((outputs,)) if with_bias else None
    if not takes(implementation, x, packed):
        return
    y = nmjax.packed_matmul(
        x, packed, bias, activation="relu" if relu else None, implementation=implementation
    )
    expected = exact(x) @ exact(nmjax.unpack(packed)) + (exact(bias) if with_bias else 0)
    assert y.dtype == jnp.promote_types(x_dtype, w_dtype)
    assert_near(y, np.maximum(expected, 0) if relu else expected, y.dtype)


def convolve(x, w, strides, pads, dilation):
    """By the definition, one output pixel at a time; x (n, h, w, i), w (th, tw, i, o)."""
    x = np.pad(exact(x), ((0, 0), *pads, (0, 0)))
    w = exact(w)
    reach = [(t - 1) * d + 1 for t, d in zip(w.shape[:2], dilation, strict=True)]
    size = [(s - r) // t + 1 for s, r, t in zip(x.shape[1:3], reach, strides, strict=True)]
    y = np.zeros((x.shape[0], *size, w.shape[-1]))
    for i in range(size[0]):
        for j in range(size[1]):
            top, left = i * strides[0], j * strides[1]
            patch = x[:, top : top + reach[0] : dilation[0], left : left + reach[1] : dilation[1]]
            y[:, i, j] = np.einsum("nhwi,hwio->no", patch, w)
    return y


@st.composite
def convolutions(draw):
    n = draw(st.sampled_from([4, 16]))
    small = st.integers(1, 3)
    taps, strides = (draw(small), draw(small)), (draw(small), draw(small))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    pads = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(2))
    reach = [(t - 1) * d + 1 for t, d in zip(taps, dilation, strict=True)]
    spatial = tuple(
        draw(st.integers(max(r - sum(p), 1), 12)) for r, p in zip(reach, pads, strict=True)
    )
    inputs, outputs = draw(st.integers(2, 20)), n * draw(st.integers(1, 3))
    where = draw(st.sampled_from(["", "/layer"]))
    dtype = draw(st.sampled_from(DTYPES))
    shape = (*taps, inputs, outputs)
    return f"1x{n}@0.5{where}", shape, draw(small), spatial, strides, pads, dilation, dtype


@pytest.mark.parametrize("implementation", NAMED)
@given(case=convolutions(), relu=st.booleans())
def test_conv_is_a_convolution_with_the_unpacked_kernel(implementation, case, relu):
    pattern, shape, images, spatial, strides, pads, dilation, dtype = case
    # test_dilation.py has those that only "xla" takes.
    wide = as_window(spatial, shape[:2], strides, pads, dilation).has_wide_gaps(spatial, shape[:2])
    assume(implementation == "xla" or not wide)
    packed = packed_weight(shape, pattern, dtype)
    x, bias = numbers((images, *spatial, shape[2]), dtype), numbers((shape[3],))
    y = nmjax.packed_conv(
        x,
        packed,
        bias,
        strides=strides,
        padding=pads,
        dilation=dilation,
        activation="relu" if relu else None,
        implementation=implementation,
    )
    expected = convolve(x, nmjax.unpack(packed), strides, pads, dilation) + exact(bias)
    assert_near(y, np.maximum(expected, 0) if relu else expected, dtype)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("pattern", ["2:4", "2:4/kernel", "1x4@0.5"])
@pytest.mark.parametrize("padding", ["SAME", "VALID", 1, ((0, 1), 2)])
def test_padding_as_xla_names_it(pattern, padding):
    packed = packed_weight((3, 2, 8, 16), pattern)
    x = numbers((2, 9, 7, 8))
    given_to_xla = {1: ((1, 1), (1, 1)), ((0, 1), 2): ((0, 1), (2, 2))}.get(padding, padding)
    y = nmjax.packed_conv(x, packed, strides=2, padding=padding)
    expected = jax.lax.conv_general_dilated(
        x, nmjax.unpack(packed), (2, 2), given_to_xla, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert_near(y, exact(expected), jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_conv_in_one_dimension(implementation):
    w = numbers((5, 6, 8))
    params = {"conv": {"kernel": w, "bias": jnp.zeros(8)}}
    packed = prune_and_pack(params, nmjax.make_plan(params, "1x4@0.5"))["conv"]["kernel"]
    x = numbers((3, 11, 6))
    y = nmjax.packed_conv(
        x, packed, strides=2, padding=((2, 1),), dilation=2, implementation=implementation
    )
    kernel = exact(nmjax.unpack(packed))[None]
    expected = convolve(x[:, None], kernel, (1, 2), ((0, 0), (2, 1)), (1, 2))[:, 0]
    assert_near(y, expected, jnp.float32)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5", "1x4@0.5/layer"])
def test_attention_projections_keep_their_axes(implementation, pattern):
    heads = {
        "query": {"kernel": numbers((16, 4, 8))},
        "key": {"kernel": numbers((16, 4, 8))},
        "value": {"kernel": numbers((16, 4, 8))},
        "out": {"kernel": numbers((4, 8, 16))},
    }
    packed = prune_and_pack(heads, nmjax.make_plan(heads, pattern))
    dense = nmjax.unpack(packed)
    x, bias = numbers((2, 3, 16)), numbers((4, 8))
    into = packed["query"]["kernel"]
    y = nmjax.packed_matmul(x, into, bias, implementation=implementation)
    expected = np.einsum("bsi,ihd->bshd", exact(x), exact(dense["query"]["kernel"])) + exact(bias)
    assert_near(y, expected, jnp.float32)
    out = nmjax.packed_matmul(y, packed["out"]["kernel"], implementation=implementation)
    assert_near(
        out, np.einsum("bshd,hdo->bso", exact(y), exact(dense["out"]["kernel"])), jnp.float32
    )


@pytest.mark.parametrize("implementation", [None, *TABLE])
@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5", "1x4@0.5/layer"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_of_input_values_and_bias(implementation, pattern, activation):
    packed = packed_weight((8, 16), pattern)
    x, bias, g = numbers((5, 8)), numbers((16,)), numbers((5, 16), seed=3)
    if not takes(implementation, x, packed):
        pytest.skip(f"{implementation} does not take {pattern}")

    def loss(x, values, bias):
        held = nmjax_replace(packed, values)
        y = nmjax.packed_matmul(x, held, bias, activation=activation, implementation=implementation)
        return jnp.vdot(y, g)

    def dense_loss(x, values, bias):
        y = x @ nmjax.unpack(nmjax_replace(packed, values)) + bias[None]
        return jnp.vdot(jax.nn.relu(y) if activation else y, g)

    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, packed.values, bias)
    expected = jax.grad(dense_loss, argnums=(0, 1, 2))(x, packed.values, bias)
    for a, b in zip(got, expected, strict=True):
        assert_near(a, exact(b), jnp.float32)


def nmjax_replace(packed, values):
    leaves, structure = jax.tree.flatten(packed)
    return jax.tree.unflatten(structure, [values, *leaves[1:]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
def test_vmap_over_the_batch_and_over_a_stack(implementation, pattern):
    packed = packed_weight((8, 16), pattern)
    x = numbers((3, 5, 8))

    def product(x, packed):
        return nmjax.packed_matmul(x, packed, implementation=implementation)

    expected = exact(x) @ exact(nmjax.unpack(packed))
    assert_near(jax.vmap(product, (0, None))(x, packed), expected, jnp.float32)
    moved = jax.vmap(product, (2, None), 1)(jnp.moveaxis(x, 0, 2), packed)
    assert_near(moved, exact(expected).swapaxes(0, 1), jnp.float32)
    stack = stacked(pattern)
    y = jax.jit(jax.vmap(product))(x, stack)
    assert_near(y, np.einsum("lbi,lio->lbo", exact(x), exact(nmjax.unpack(stack))), jnp.float32)


def stacked(pattern):
    one = {"layer": {"kernel": numbers((8, 16))}}
    plan = nmjax.make_plan(one, pattern)
    return prune_and_pack({"layer": {"kernel": numbers((3, 8, 16))}}, plan)["layer"]["kernel"]


@pytest.mark.optimized
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_shard_multiplies_its_own_outputs(implementation, pattern, axis_type):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(axis_type,))
    packed, x = packed_weight((16, 64), pattern), numbers((6, 16))
    outputs = PartitionSpec("model") if pattern == "1x4@0.5" else PartitionSpec(None, "model")
    if pattern == "2:4":
        specs = [PartitionSpec(None, None, "model"), outputs]
    else:
        specs = [outputs, outputs]
    specs = jax.tree.unflatten(jax.tree.structure(packed), specs)
    shardings = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs)
    sharded = jax.device_put(packed, shardings)
    x = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def product(x, packed):
        return jax.shard_map(
            lambda x, packed: nmjax.packed_matmul(x, packed, implementation=implementation),
            mesh=mesh,
            in_specs=(PartitionSpec(), specs),
            out_specs=PartitionSpec(None, "model"),
        )(x, packed)

    assert_near(product(x, sharded), exact(x) @ exact(nmjax.unpack(packed)), jnp.float32)
    text = product.lower(x, sharded).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


def test_rows_of_unequal_length_cannot_be_cut():
    packed, x = packed_weight((16, 32), "1x4@0.5/layer"), numbers((2, 16))
    shard = dataclasses.replace(packed, row_pointers=packed.row_pointers[:5])
    with pytest.raises(ValueError, match="4 row pointers for 8 rows of blocks"):
        nmjax.packed_matmul(x, shard)


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
def test_a_batch_sharded_over_explicit_axes_stays_so(pattern):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    by_data = jax.NamedSharding(mesh, PartitionSpec("data"))
    packed, x = packed_weight((16, 32), pattern), numbers((8, 16))
    w = nmjax.unpack(packed)
    packed = jax.device_put(packed, jax.NamedSharding(mesh, PartitionSpec()))
    y = jax.jit(nmjax.packed_matmul)(jax.device_put(x, by_data), packed)
    assert jax.typeof(y).sharding.spec == PartitionSpec("data", None)
    assert_near(y, exact(x) @ exact(w), jnp.float32)


@KERNELS
def test_kernels_refuse_a_batch_sharded_over_explicit_axes():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(numbers((8, 16)), jax.NamedSharding(mesh, PartitionSpec("data")))
    packed = packed_weight((16, 32), "1x4@0.5")
    with pytest.raises(NotImplementedError, match=r"explicit axes of a mesh; use jax\.shard_map"):
        nmjax.packed_matmul(x, packed, implementation="ffi")


@KERNELS
@pytest.mark.parametrize("pattern", ["2:4", "1x16@0.5", "1x16@0.5/layer"])
def test_threads_that_call_at_once_get_the_same(pattern):
    packed, x = packed_weight((256, 512), pattern), numbers((100, 256))
    product = jax.jit(lambda x: nmjax.packed_matmul(x, packed, implementation="ffi"))
    alone = np.asarray(product(x))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: np.asarray(product(x)), range(64)):
            np.testing.assert_array_equal(result, alone)


@KERNELS
def test_an_index_out_of_range_is_refused_not_read():
    packed = packed_weight((16, 32), "1x4@0.5")
    leaves, structure = jax.tree.flatten(packed)
    forged = jax.tree.unflatten(structure, [leaves[0], leaves[1].at[2, 3].set(200)])
    for batch in (1, 40):
        with pytest.raises(Exception, match="index out of range"):
            jax.block_until_ready(
                nmjax.packed_matmul(numbers((batch, 16)), forged, implementation="ffi")
            )


@pytest.mark.optimized
def test_nothing_of_the_dense_weight_is_computed():
    if load_library().instruction_set in (None, "portable"):
        pytest.skip("the weight is unpacked here")
    packed, x = packed_weight((96, 80), "1x16@0.75"), numbers((20, 96))
    text = jax.jit(nmjax.packed_matmul).lower(x, packed).compile().as_text()
    assert "nmjax_blocks" in text
    assert "96,80" not in text


def output_of(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.strip()


def kernels_with(**environment):
    """What `nmjax.backends` says; tests of kernels that do not load would only be skipped."""
    return output_of("-c", "import nmjax; print(nmjax.backends()['ffi'])", **environment)


def run_tests(**environment):
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow"]
    files = (__file__, str(Path(__file__).parent / "cpu" / "test_int8.py"))
    said = output_of("-m", "pytest", *options, *files, **environment)
    assert " passed" in said
    return said


@pytest.mark.slow
@KERNELS
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_vnni"])
def test_every_instruction_set(isa):
    if kernels_with(NMJAX_KERNELS_ISA=isa) != f"ready: {isa}":
        pytest.skip(f"this machine has no {isa}")
    run_tests(NMJAX_KERNELS_ISA=isa)


@pytest.mark.slow
def test_without_kernels():
    assert "skipped" in run_tests(NMJAX_DISABLE_FFI="1")


@pytest.mark.slow
@KERNELS
def test_under_sanitizers(tmp_path):
    library = tmp_path / "sanitized.so"
    build.compile_library("g++", library, build.SANITIZERS)
    # jaxlib throws exceptions, which the sanitizer finds only if libstdc++ is there before it.
    preload = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = {
        "NMJAX_KERNELS_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
    assert kernels_with(**environment).startswith("ready")
    run_tests(**environment)
