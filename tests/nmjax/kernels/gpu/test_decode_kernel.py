"""The decode kernel's own source, run on the CPU by a stand-in for CUDA, on weights nmjax packed.

Numbers are small integers, so that every sum is exact and one wrong lane is a wrong result.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax.kernels import build, reference
from nmjax.kernels.gpu import decode as decode_module
from tests.nmjax.packed_weights import prune_and_pack


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("decode") / "decode.so"
    here = Path(__file__).parent
    folders = [build.FOLDER / "gpu" / "src", here / "stand_in"]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-fno-gnu-unique"]
    flags += [*(f"-I{folder}" for folder in folders), f"-isystem{build.include_folder()}"]
    source = str(here / "decode_calls_on_cpu.cc")
    subprocess.run(["g++", *flags, source, "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture
def decode(library):
    return library.decode_on_cpu


@pytest.fixture
def called(library, monkeypatch):
    """The public function, as on a machine that has the kernel and a GPU."""
    capsule = jax.ffi.pycapsule(library.on_cpu_decode)
    jax.ffi.register_ffi_target("nmjax_decode", capsule, platform="cpu")
    monkeypatch.setattr(decode_module, "check_decode", lambda: None)

    return decode_module.matmul


def address(x):
    return None if x is None else ctypes.c_void_p(x.ctypes.data)


def run(decode, x, w, bias, relu, lane_outputs, tiles):
    """The kernel's product, of a packed weight or one of integers."""
    quantized = isinstance(w, nmjax.Quantized)
    packed = w.packed if quantized else w
    arrays = [np.ascontiguousarray(a) for a in (x, packed.values, packed.codes)]
    scales = np.ascontiguousarray(w.scales) if quantized else None
    y = np.zeros((x.shape[0], packed.shape[1]), arrays[0].dtype)
    pointers = [address(a) for a in (*arrays, scales, bias, y)]
    sizes = map(ctypes.c_int64, (x.shape[0], *packed.shape))
    numbers = 2 if quantized else int(x.dtype == jnp.float16)
    assert decode(numbers, lane_outputs, tiles, *pointers, *sizes, relu) == 1
    return y


def integers(shape, seed):
    """Whole numbers, of which some outputs have large ones and some negative ones."""
    rng = np.random.default_rng(seed)
    return rng.integers(-3, 4, shape) + 8 * rng.integers(-1, 2, shape[-1])


def packed_and_pruned(w):
    params = {"kernel": w}
    plan = nmjax.make_plan(params, "2:4")
    return prune_and_pack(params, plan)["kernel"], nmjax.prune(params, plan)["kernel"]


VARIANTS = pytest.mark.parametrize(
    ("lane_outputs", "tiles", "batch", "inputs", "outputs"),
    [
        (8, 1, 1, 16, 64),
        (8, 1, 8, 656, 128),  # Neither all warps nor all looks ahead have the same to do.
        (8, 2, 11, 160, 64),
        (8, 8, 64, 160, 64),
        (4, 4, 37, 64, 32),
        (2, 1, 5, 176, 48),
    ],
)


@pytest.mark.one_in(2)
@VARIANTS
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_are_exact(decode, dtype, lane_outputs, tiles, batch, inputs, outputs):
    packed, pruned = packed_and_pruned(jnp.asarray(integers((inputs, outputs), inputs), dtype))
    rng = np.random.default_rng(batch)
    x = jnp.asarray(rng.integers(-2, 3, (batch, inputs)), dtype)
    bias = None if batch == 1 else rng.integers(-9, 9, outputs).astype(np.float32)
    relu = batch != 1
    expected = np.asarray(x, np.float64) @ np.asarray(pruned, np.float64)
    expected += 0 if bias is None else bias
    expected = np.maximum(expected, 0) if relu else expected
    y = run(decode, x, packed, bias, relu, lane_outputs, tiles)
    np.testing.assert_array_equal(y, np.asarray(jnp.asarray(expected, jnp.float32).astype(dtype)))


@VARIANTS
def test_products_with_integers_are_exact(decode, lane_outputs, tiles, batch, inputs, outputs):
    rng = np.random.default_rng(inputs)
    packed, _ = packed_and_pruned(jnp.asarray(integers((inputs, outputs), inputs), jnp.bfloat16))
    values = jnp.asarray(rng.integers(-128, 128, packed.values.shape), jnp.int8)
    scales = jnp.asarray(2.0 ** rng.integers(-3, 4, outputs), jnp.float32)
    w = nmjax.Quantized(packed.with_values(values), scales, jnp.dtype(jnp.float32))
    x = jnp.asarray(rng.integers(-2, 3, (batch, inputs)), jnp.bfloat16)
    bias = None if batch == 1 else rng.integers(-9, 9, outputs).astype(np.float32)
    y = run(decode, x, w, bias, batch != 1, lane_outputs, tiles)
    dense = np.asarray(w.unpack(), np.float64)
    expected = np.asarray(x, np.float64) @ dense + (0 if bias is None else bias)
    expected = np.maximum(expected, 0) if batch != 1 else expected
    expected = np.asarray(jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16))
    np.testing.assert_array_equal(y, expected)
    definition = reference.matmul(x, w, bias, "relu" if batch != 1 else None)
    np.testing.assert_array_equal(y, np.asarray(definition))


def test_every_integer_is_expanded(decode):
    w = jnp.asarray(np.tile([[1], [2], [0], [0]], (4, 256)), jnp.bfloat16)
    packed, _ = packed_and_pruned(w)
    values = np.zeros(packed.values.shape, np.int8)
    values[0, 0], values[0, 1] = np.arange(-128, 128), np.arange(127, -129, -1)
    packed = packed.with_values(jnp.asarray(values))
    w = nmjax.Quantized(packed, jnp.ones(256, jnp.float32), jnp.dtype(jnp.float32))
    y = run(decode, jnp.eye(8, 16, dtype=jnp.bfloat16), w, None, False, 8, 1)
    np.testing.assert_array_equal(y[:2].astype(int), values[0])


@pytest.mark.parametrize("kept", [(i, j) for i in range(4) for j in range(i + 1, 4)])
def test_every_pair_of_positions_is_expanded(decode, kept):
    group = np.zeros(4)
    group[list(kept)] = (1, 2)
    w = jnp.asarray(np.tile(group, 4)[:, None] * np.ones(64), jnp.bfloat16)
    packed, _ = packed_and_pruned(w)
    y = run(decode, jnp.eye(8, 16, dtype=jnp.bfloat16), packed, None, False, 8, 1)
    np.testing.assert_array_equal(y, np.asarray(w[:8]))


@pytest.mark.parametrize(
    ("kind", "batch", "outputs", "vector"),
    [
        ("bfloat16", 3, 128, 0),
        ("bfloat16", 5, 48, 2),
        ("float16", 30, 32, 4),
        ("float16", 50, 64, 8),
        ("int8", 3, 128, 0),
        ("int8", 16, 64, 8),
    ],
)
def test_what_xla_calls_is_the_product(called, kind, batch, outputs, vector):
    dtype = jnp.float16 if kind == "float16" else jnp.bfloat16
    w, _ = packed_and_pruned(jnp.asarray(integers((32, outputs), outputs), dtype))
    rng = np.random.default_rng(batch)
    x = jnp.asarray(rng.integers(-2, 3, (batch, 32)), dtype)
    bias = jnp.asarray(rng.integers(-9, 9, outputs), dtype)
    if kind == "int8":
        w = nmjax.quantize(w)
    y = called(x, w, bias, "relu", vector=vector)
    definition = reference.matmul(x, w, bias, "relu")
    np.testing.assert_allclose(np.asarray(y, float), np.asarray(definition, float), rtol=2**-7)
    if kind != "int8":
        np.testing.assert_array_equal(y, definition)  # Sums of whole numbers.


def test_a_mapped_axis_joins_the_batch(called):
    w, _ = packed_and_pruned(jnp.asarray(integers((32, 64), 0), jnp.bfloat16))
    xs = jnp.asarray(np.random.default_rng(0).integers(-2, 3, (3, 2, 32)), jnp.bfloat16)
    mapped = jax.vmap(called, (0, None))(xs, w)
    np.testing.assert_array_equal(mapped, reference.matmul(xs.reshape(6, 32), w).reshape(3, 2, 64))


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize(
    ("batch_axis", "output_axis"), [("data", None), (None, "model"), ("data", "model")]
)
def test_batch_and_outputs_stay_where_they_are(called, is_quantized, batch_axis, output_axis):
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    packed, _ = packed_and_pruned(jnp.asarray(integers((32, 64), 0), jnp.bfloat16))
    w = nmjax.quantize(packed) if is_quantized else packed
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(-2, 3, (6, 32)), jnp.bfloat16)
    bias = jnp.asarray(rng.integers(-9, 9, 64), jnp.float32) if is_quantized else None
    expected = called(x, w, bias)

    def place(array, *axes):
        return jax.device_put(array, NamedSharding(mesh, P(*axes)))

    x = place(x, batch_axis)
    w = jax.tree.map(lambda array: place(array, *[None] * (array.ndim - 1), output_axis), w)
    compiled = jax.jit(called).lower(x, w, bias).compile()
    assert "all-gather" not in compiled.as_text()
    assert "nmjax_decode" in compiled.as_text()
    y = compiled(x, w, bias)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(batch_axis, output_axis)), 2)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": jnp.zeros((3, 64), jnp.uint8)}, "do not fit each other"),
        ({"values": jnp.zeros((8, 2, 64), jnp.int8)}, "do not fit each other"),
        ({"values": jnp.zeros((8, 2, 64), jnp.float16)}, "values of int8"),
        ({"vector": 3}, "2, 4 or 8 outputs"),
        ({"x": jnp.zeros((2, 24), jnp.bfloat16)}, "multiples of 16"),
        ({"bias": jnp.zeros(32, jnp.float32)}, "do not fit each other"),
    ],
    ids=["codes", "scales", "values", "vector", "inputs", "bias"],
)
def test_what_does_not_fit_is_refused(called, change, words):
    operands = {
        "x": jnp.zeros((2, 32), jnp.bfloat16),
        "values": jnp.zeros((8, 2, 64), jnp.bfloat16),
        "codes": jnp.zeros((4, 64), jnp.uint8),
        "scales": jnp.zeros(0, jnp.float32),
        "bias": jnp.zeros(0, jnp.float32),
        "vector": 0,
    } | change
    vector = operands.pop("vector")
    call = jax.ffi.ffi_call("nmjax_decode", jax.ShapeDtypeStruct((2, 64), jnp.bfloat16))
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        jax.block_until_ready(call(*operands.values(), relu=False, vector=np.int64(vector)))


@pytest.mark.slow  # A minute.
def test_nvcc_compiles_it(tmp_path):
    if build.find_nvcc() is None:
        pytest.skip("no nvcc")
    library = build.compile_decode(tmp_path / "library.so")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert "nmjax_decode" in symbols
