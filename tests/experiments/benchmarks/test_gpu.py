"""The benchmark of GPUs, as far as it goes without one: kernels are played by dense products."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from experiments.benchmarks import gpu, gpu_checks, gpu_products
from nmjax.kernels import reference
from nmjax.kernels.gpu import cusparselt, decode
from nmjax.kernels.gpu.cusparselt_library import CusparseLt
from nmjax.kernels.gpu.cusparselt_limits import GELU, RESULTS


@pytest.fixture
def dense_kernels(monkeypatch):
    """Products by definition under the names of the kernels."""

    def compress(w, *, transposed=False):
        cusparselt._check_2_4(w, transposed)
        data = (w.T if transposed else w).ravel().view(jnp.uint8)
        return cusparselt.Compressed(data, w.shape, transposed, w.dtype)

    def matmul(x, w, bias=None, activation=None, *, dtype=None):
        dense = w.data.view(w.dtype).reshape(w.inputs, w.outputs)
        result = jnp.dtype(dtype or RESULTS[str(w.dtype)][0])
        y = jnp.matmul(x.astype(jnp.float32), dense.astype(jnp.float32))
        y = reference.finish(y, bias, activation, y.dtype)
        if jnp.issubdtype(result, jnp.integer):
            limits = jnp.iinfo(result)
            y = jnp.clip(jnp.round(y), limits.min, limits.max)
        return y.astype(result)

    def decode_matmul(x, packed, bias=None, activation=None, *, vector=0):
        return reference.matmul(x, packed, bias, activation)

    monkeypatch.setattr(cusparselt, "compress", compress)
    monkeypatch.setattr(cusparselt, "matmul", matmul)
    monkeypatch.setattr(cusparselt, "tune", lambda *arguments, **settings: None)
    monkeypatch.setattr(decode, "matmul", decode_matmul)


def run(monkeypatch, tmp_path, only):
    arguments = ["gpu", "--only", only, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("NMJAX_CACHE_DIR", "")  # The benchmark sets it.
    with pytest.raises(SystemExit) as end:
        gpu.main()
    (path,) = tmp_path.glob("gpu-cpu*.json")
    return json.loads(path.read_text()), end.value.code


def test_without_a_gpu_it_says_what_it_skips(monkeypatch, tmp_path):
    results, code = run(monkeypatch, tmp_path, "check")
    rows = results["check sparse_dense in XLA"]
    assert len(rows) == 3
    assert all(row["right"] for row in rows)
    for name in ("check cusparselt, int8, transposed", "check decode", "check sparse_dense"):
        assert "not on an NVIDIA GPU" in results[name]["skipped"]
    assert code == 0


def test_a_section_that_fails_does_not_hide_the_others(monkeypatch, tmp_path):
    def broken(implementation):
        yield {**next(iter(checks(implementation))), "right": False}

    checks = gpu_checks.check_sparse_dense
    monkeypatch.setattr(gpu_checks, "check_sparse_dense", broken)
    results, code = run(monkeypatch, tmp_path, "check")
    assert '"right": false' in results["check sparse_dense in XLA"]["failed"]
    assert "skipped" in results["check decode"]
    assert code == 1


@pytest.mark.slow
def test_every_section_of_a_gpu_runs(dense_kernels, monkeypatch, tmp_path):
    def checks_in_xla(implementation="xla"):
        return check_sparse_dense("xla")

    def small(make, *arguments):
        return lambda *others: make(*arguments, 1)

    check_sparse_dense = gpu_checks.check_sparse_dense
    monkeypatch.setattr(gpu, "check_gpu", lambda: None)
    monkeypatch.setattr(gpu, "built", lambda: {"cusparselt": "compiled"})
    monkeypatch.setattr(gpu, "translated", dict)
    monkeypatch.setattr(gpu, "masked", small(gpu.masked, 16))
    network = gpu.Transformer(1, 16, 2, 32)
    monkeypatch.setattr(gpu, "trained", small(gpu.trained, network, (1, 4)))
    monkeypatch.setattr(gpu_checks, "check_sparse_dense", checks_in_xla)
    monkeypatch.setattr(gpu_checks, "check_packed_matmul", checks_in_xla)
    monkeypatch.setattr(gpu_checks, "SHAPES", gpu_checks.SHAPES[:1])
    monkeypatch.setattr(gpu_checks, "ROWS_AND_VECTORS", ((3, 2),))
    monkeypatch.setattr(gpu_products, "MANY_ROWS", gpu_products.SMALL[:1])
    monkeypatch.setattr(gpu_products, "FEW_ROWS", gpu_products.SMALL[:1])
    monkeypatch.setattr(gpu_products.Product, "repeats", 2)
    results, code = run(monkeypatch, tmp_path, "")
    assert code == 0, results
    sections = set(results) - {"machine", "seconds"}
    assert sections == set(results["seconds"])
    assert sections >= {"few rows", "many rows", "mask and apply", "train step", "check decode"}
    assert results["many rows"][0]["speedup"] > 0


def test_every_timed_program_translates(monkeypatch):
    monkeypatch.setattr(cusparselt, "load_cusparselt", lambda: CusparseLt("1.2.3"))
    monkeypatch.setattr(decode, "check_decode", lambda: None)
    programs = list(gpu_products.lowered_products())
    assert len(programs) == sum(
        len(cases) for cases in (gpu_products.MANY_ROWS, gpu_products.SMALL, gpu_products.FEW_ROWS)
    )
    for product, text in programs:
        call = "nmjax_decode" if product in gpu_products.FEW_ROWS else "nmjax_cusparselt_matmul"
        assert f"@{call}" in text
    assert {product.dtype for product, _ in programs} == set(RESULTS)


@pytest.mark.parametrize(
    "dtype",
    [
        name if name in ("bfloat16", "int8") else pytest.param(name, marks=pytest.mark.slow)
        for name in RESULTS
    ],
)
def test_right_products_are_found_right(dense_kernels, monkeypatch, dtype):
    monkeypatch.setattr(gpu_checks, "SHAPES", gpu_checks.SHAPES[:1])
    for transposed in (True,) if jnp.dtype(dtype).itemsize == 1 else (False, True):
        rows = list(gpu_checks.check_cusparselt(dtype, transposed))
        assert len(rows) == 2 * len(RESULTS[dtype]) + len(GELU.get(dtype, ()))
        assert all(row["right"] for row in rows), rows


@pytest.mark.parametrize("wrong", [lambda y: y * jnp.float32("nan"), lambda y: y[::-1]])
def test_wrong_products_are_found_wrong(dense_kernels, monkeypatch, wrong):
    monkeypatch.setattr(gpu_checks, "SHAPES", gpu_checks.SHAPES[:1])
    right = cusparselt.matmul
    monkeypatch.setattr(cusparselt, "matmul", lambda *a, **s: wrong(right(*a, **s)))
    rows = list(gpu_checks.check_cusparselt("bfloat16", False))
    assert not any(row["right"] for row in rows)


@pytest.mark.slow
def test_the_decode_checks_run(dense_kernels):
    assert all(row["right"] for row in gpu_checks.check_decode())


@pytest.mark.parametrize(
    "product",
    [
        product if product.dtype == "bfloat16" else pytest.param(product, marks=pytest.mark.slow)
        for product in gpu_products.SMALL
    ],
    ids=lambda product: product.dtype,
)
def test_many_rows_are_timed(dense_kernels, monkeypatch, product):
    monkeypatch.setattr(gpu_products.Product, "repeats", 2)
    row = gpu_products.time_many_rows(product, 1)
    assert row["speedup"] > 0
    expected = {"dense", "dense, transposed", "sparse, transposed", "sparse, transposed, not tuned"}
    assert expected <= set(row["ms"])
    assert ("sparse" in row["ms"]) == (product.dtype in ("bfloat16", "float16"))


def test_one_way_that_fails_does_not_hide_the_other(dense_kernels, monkeypatch):
    def compress(w, *, transposed=False):
        if not transposed:
            raise ValueError("not supported")
        return works(w, transposed=transposed)

    works = cusparselt.compress
    monkeypatch.setattr(cusparselt, "compress", compress)
    monkeypatch.setattr(gpu_products.Product, "repeats", 2)
    row = gpu_products.time_many_rows(gpu_products.SMALL[0], 1)
    assert row["failed"] == {"sparse": "not supported"}
    assert "sparse, transposed" in row["ms"]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_product_without_one_side_is_an_error(kind):
    def fail():
        raise ValueError("not supported")

    candidates = {"dense": lambda: {"dense": lambda: 0}, "sparse": lambda: {"sparse": lambda: 0}}
    with pytest.raises(RuntimeError, match=f"no {kind} product.*not supported"):
        gpu_products.measured(gpu_products.SMALL[0], candidates | {kind: fail}, 1)


def test_a_step_of_the_build_that_fails_does_not_hide_the_other(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(gpu.build, "missing_headers", lambda: "")
    monkeypatch.setattr(gpu.build, "compile_cusparselt", fail)
    monkeypatch.setattr(gpu.build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(gpu.build, "compile_decode", lambda: None)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    with pytest.raises(RuntimeError, match=r"no such instruction.*decode.*compiled in 0 s"):
        gpu.built()


def test_few_rows_are_timed(dense_kernels, monkeypatch):
    monkeypatch.setattr(gpu_products.Product, "repeats", 2)
    row = gpu_products.time_few_rows(gpu_products.SMALL[0], 1)
    assert set(row["ms"]) > {"dense", "sparse", "variant, 8 outputs a thread", "int8 values"}
    assert row["speedup of int8 values"] > 0


def test_a_product_that_fails_is_a_row(capsys):
    def measure(product, rounds):
        if product.dtype == "int8":
            raise RuntimeError("no kernel")
        return {"dtype": product.dtype, "speedup": 1.0}

    rows = gpu.timed(gpu_products.SMALL, measure, 1, np.inf)
    assert [row.get("failed") for row in rows] == [None, None, "no kernel", None]
    assert gpu.timed(gpu_products.SMALL, measure, 1, 0)[0]["skipped"] == "no time left"
    rows = gpu.timed(gpu_products.SMALL, measure, 1, np.inf, minutes=-1)
    assert all(row["skipped"] == "no time left" for row in rows)


def test_the_transformer_has_its_size():
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    module = gpu.Transformer()
    variables = jax.eval_shape(module.init, jax.random.key(0), tokens)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(variables)) / 1e6) == 354
    plan = nmjax.make_plan(variables["params"], "2:4")
    assert sum(np.prod(plan[name].shape) for name in plan) == 24 * 12 * 1024**2


@pytest.mark.slow
def test_the_small_training_runs():
    row = gpu.trained(gpu.Transformer(1, 16, 2, 32), (1, 4), 1)
    assert row["ratio"] > 0
    assert gpu.masked(16, 1)[0]["ratio"] > 0
