"""The decode kernel's own source, run on the CPU by a stand-in for CUDA, on weights nmjax packed.

Numbers are small integers, so that every sum is exact and one wrong lane is a wrong result.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.kernels import build


@pytest.fixture(scope="module")
def decode(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("decode") / "decode.so"
    source = Path(__file__).parent / "decode_on_cpu.cc"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{build.FOLDER / 'src'}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path)).decode_on_cpu


def run(decode, x, packed, bias, relu, lane_outputs, tiles):
    arrays = [np.ascontiguousarray(a) for a in (x, packed.values, packed.codes)]
    y = np.zeros((x.shape[0], packed.shape[1]), arrays[0].dtype)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
    pointers.append(None if bias is None else ctypes.c_void_p(bias.ctypes.data))
    pointers.append(ctypes.c_void_p(y.ctypes.data))
    sizes = map(ctypes.c_int64, (x.shape[0], *packed.shape))
    half = x.dtype == jnp.float16
    assert decode(half, lane_outputs, tiles, *pointers, *sizes, relu) == 1
    return y


@pytest.mark.parametrize(
    ("lane_outputs", "tiles", "batch", "inputs", "outputs"),
    [
        (8, 1, 1, 16, 64),
        (8, 1, 8, 656, 128),  # Neither all warps nor all looks ahead have the same to do.
        (8, 2, 11, 160, 64),
        (4, 4, 37, 64, 32),
        (2, 1, 5, 176, 48),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_are_exact(decode, dtype, lane_outputs, tiles, batch, inputs, outputs):
    rng = np.random.default_rng(inputs)
    w = jnp.asarray(
        rng.integers(-3, 4, (inputs, outputs)) + 8 * rng.integers(-1, 2, outputs), dtype
    )
    params = {"kernel": w}
    plan = nmjax.make_plan(params, "2:4")
    packed, pruned = nmjax.pack(params, plan)["kernel"], nmjax.prune(params, plan)["kernel"]
    x = jnp.asarray(rng.integers(-2, 3, (batch, inputs)), dtype)
    bias = None if batch == 1 else rng.integers(-9, 9, outputs).astype(np.float32)
    relu = batch != 1
    expected = np.asarray(x, np.float64) @ np.asarray(pruned, np.float64)
    expected += 0 if bias is None else bias
    expected = np.maximum(expected, 0) if relu else expected
    y = run(decode, x, packed, bias, relu, lane_outputs, tiles)
    np.testing.assert_array_equal(y, np.asarray(jnp.asarray(expected, jnp.float32).astype(dtype)))


@pytest.mark.parametrize("kept", [(i, j) for i in range(4) for j in range(i + 1, 4)])
def test_every_pair_of_positions_is_expanded(decode, kept):
    group = np.zeros(4)
    group[list(kept)] = (1, 2)
    w = jnp.asarray(np.tile(group, 4)[:, None] * np.ones(64), jnp.bfloat16)
    params = {"kernel": w}
    packed = nmjax.pack(params, nmjax.make_plan(params, "2:4"))["kernel"]
    y = run(decode, jnp.eye(8, 16, dtype=jnp.bfloat16), packed, None, False, 8, 1)
    np.testing.assert_array_equal(y, np.asarray(w[:8]))


@pytest.mark.slow  # Half a minute.
def test_nvcc_compiles_it(tmp_path):
    if build.find_nvcc() is None:
        pytest.skip("no nvcc")
    library = build.compile_decode(tmp_path / "library.so")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert "nmjax_decode" in symbols
