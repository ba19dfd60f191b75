"""The checks of a GPU, through XLA's calls of ours to a stand-in for cuSPARSELt: on the CPU."""

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
from experiments.benchmarks import gpu_checks
from nmjax.kernels import build, matmul
from nmjax.kernels.gpu import cusparselt, dense_layer
from nmjax.kernels.gpu.cusparselt_library import CusparseLt
from nmjax.kernels.gpu.cusparselt_limits import RESULTS

STAND_INS = Path(__file__).parents[2] / "nmjax" / "kernels" / "gpu"
W = (64, 32)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("on_cpu") / "on_cpu.so"
    folders = [build.FOLDER / "gpu" / "src", STAND_INS / "stand_in"]
    sources = [str(STAND_INS / name) for name in ("cusparselt_on_cpu.cc", "fake_cusparselt.cc")]
    command = ["g++", "-std=c++17", "-O0", "-shared", "-fPIC", "-pthread", *sources]
    command += ["-Wl,-Bsymbolic", "-fno-gnu-unique", f"-isystem{build.include_folder()}"]
    command += [f"-I{folder}" for folder in folders]
    subprocess.run([*command, "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    for name in ("compress", "matmul", "search"):
        capsule = jax.ffi.pycapsule(getattr(loaded, f"on_cpu_{name}"))
        jax.ffi.register_ffi_target(f"nmjax_cusparselt_{name}", capsule, platform="cpu")
    return loaded


@pytest.fixture
def on_cpu(library, monkeypatch, tmp_path):
    """As on a machine that has cuSPARSELt and a GPU."""
    state = CusparseLt("1.2.3", library=library)
    monkeypatch.setattr(cusparselt, "load_cusparselt", lambda: state)
    for module in (cusparselt, dense_layer):
        monkeypatch.setattr(module, "check_gpu", lambda *dtype: None)
    row = matmul.IMPLEMENTATIONS["cusparselt"]._replace(check=cusparselt.check)
    monkeypatch.setitem(matmul.IMPLEMENTATIONS, "cusparselt", row)
    monkeypatch.setenv("NMJAX_CACHE_DIR", str(tmp_path))
    jax.clear_caches()


@pytest.mark.parametrize("dtype", RESULTS)
def test_what_a_gpu_is_asked_to_check_is_right(on_cpu, monkeypatch, dtype):
    monkeypatch.setattr(gpu_checks, "SHAPES", ((16, 64, 32),))
    for transposed in (True,) if jnp.dtype(dtype).itemsize == 1 else (False, True):
        rows = list(gpu_checks.check_cusparselt(dtype, transposed))
        assert rows
        assert all(row["right"] for row in rows), rows


def test_a_search_is_used_from_then_on(on_cpu):
    x, w = gpu_checks.numbers((8, 64), "bfloat16", 0), gpu_checks.numbers(W, "bfloat16", 1)
    compressed = cusparselt.compress(gpu_checks.pruned(w, -2))
    before = cusparselt.matmul(x, compressed)
    assert (
        cusparselt.known_algorithm(
            cusparselt._question(x, compressed, None, None, jnp.dtype("bfloat16"))
        )
        is None
    )
    cusparselt.tune(x, compressed)
    found = cusparselt.known_algorithm(
        cusparselt._question(x, compressed, None, None, jnp.dtype("bfloat16"))
    )
    assert found[:3] == (7, 2, 2)
    np.testing.assert_array_equal(cusparselt.matmul(x, compressed), before)
    text = jax.jit(lambda x, w: cusparselt.matmul(x, w)).lower(x, compressed).as_text()
    assert "dense<[7, 2, 2]>" in text


def test_the_library_s_words_reach_the_user(on_cpu):
    w = gpu_checks.numbers(W, "bfloat16", 1)  # Not 2:4.
    with pytest.raises(jax.errors.JaxRuntimeError, match="cusparseLtSpMMACompress2: invalid"):
        jax.block_until_ready(jax.jit(cusparselt.compress)(w))


def test_packed_products_and_layers(on_cpu):
    x, w = gpu_checks.numbers((8, 64), "bfloat16", 0), gpu_checks.numbers(W, "bfloat16", 1)
    packed = gpu_checks._packed(w)
    bias = gpu_checks.numbers((32,), "bfloat16", 2)
    for activation in (None, "relu"):
        expected, y = (
            nmjax.packed_matmul(x, packed, bias, activation=activation, implementation=name)
            for name in ("xla", "cusparselt")
        )
        np.testing.assert_allclose(
            np.asarray(y, float), np.asarray(expected, float), rtol=2**-7, atol=1e-3
        )
    rows = list(gpu_checks.check_sparse_dense("cusparselt"))
    assert len(rows) == 3
    assert all(row["right"] for row in rows), rows


def test_a_mapped_axis_joins_the_batch(on_cpu):
    xs = gpu_checks.numbers((3, 8, 64), "float16", 0)
    compressed = cusparselt.compress(gpu_checks.pruned(gpu_checks.numbers(W, "float16", 1), -2))
    mapped = jax.vmap(cusparselt.matmul, (0, None))(xs, compressed)
    one_by_one = jnp.stack([cusparselt.matmul(x, compressed) for x in xs])
    np.testing.assert_array_equal(mapped, one_by_one)


def test_data_parallel_training_gathers_nothing(on_cpu):
    """Each of four devices multiplies 16 of 64 rows, forwards and backwards."""
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-2, 3, (64, 32)), jnp.bfloat16)
    w = jnp.asarray(rng.integers(-4, 5, (32, 32)), jnp.bfloat16)

    def loss(x, w, implementation):
        y = nmjax.kernels.sparse_dense(x, w, implementation=implementation)
        return (y.astype(jnp.float32) ** 2).sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    expected = step(x, w, "xla")
    x, w = (jax.device_put(a, NamedSharding(mesh, P(*s))) for a, s in ((x, ("data",)), (w, ())))
    text = step.lower(x, w, "cusparselt").compile().as_text()
    products = [line for line in text.splitlines() if "nmjax_cusparselt_matmul" in line]
    assert len(products) == 2
    assert all("bf16[16,32]" in line for line in products)
    assert "all-gather" not in text
    found = step(x, w, "cusparselt")
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=1e-2)
