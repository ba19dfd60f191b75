"""What cuSPARSELt is given and refused, and what XLA is asked to call; no GPU is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmjax
from nmjax.kernels import cusparselt
from nmjax.kernels.algorithms import Algorithm
from nmjax.kernels.cusparselt_library import CusparseLt
from nmjax.patterns import NM


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """As on a machine that has cuSPARSELt."""
    monkeypatch.setattr(cusparselt, "load_cusparselt", lambda: CusparseLt("1.2.3"))


def packed_leaf(pattern="2:4", shape=(32, 16), dtype=jnp.bfloat16):
    params = {"kernel": jnp.ones(shape, dtype)}
    return nmjax.pack(params, nmjax.make_plan(params, pattern))["kernel"]


def compressed_like(shape=(32, 16), transposed=False, dtype="bfloat16"):
    dtype = np.dtype(jnp.dtype(dtype))
    data = jnp.zeros(cusparselt.compressed_bytes(shape, dtype), jnp.uint8)
    return cusparselt.Compressed(data, shape, transposed, dtype)


def cuda_text(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@given(st.integers(1, 8), st.sampled_from([1, 2, 4, 8, 12, 16]), st.integers(0, 2**32 - 1))
def test_which_patterns_are_2_4(n, m, seed):
    if n > m:
        return
    w = np.random.default_rng(seed).normal(size=(48, 4))
    mask = np.asarray(nmjax.nm_mask(jnp.asarray(w, jnp.float32), n, m))
    fits = (mask.reshape(12, 4, 4).sum(axis=1) <= 2).all()
    if cusparselt.is_2_4(NM(n, m)):
        assert fits
    worst = np.arange(48) % m < n  # The kept ones of each group in a row.
    assert cusparselt.is_2_4(NM(n, m)) == (worst.reshape(12, 4).sum(axis=1) <= 2).all()


@pytest.mark.parametrize(
    ("pattern", "shape", "fits"),
    [
        ("2:4", (32, 16), True),
        ("1:4", (32, 16), True),
        ("2:8", (32, 16), True),
        ("2:4", (32, 24), False),
        ("1:8", (24, 16), False),
        ("4:8", (32, 16), False),
        ("1x4@0.5", (32, 16), False),
        ("2:4", (3, 3, 32, 16), False),
    ],
)
def test_which_layers_sparse_tensor_cores_run(pattern, shape, fits):
    packed = packed_leaf(pattern, shape, jnp.float32)
    assert (cusparselt.why_not_2_4(packed) is None) == fits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float8_e4m3fn"])
def test_every_dtype_gets_its_results(dtype):
    transposed = dtype in ("int8", "float8_e4m3fn")
    w = jax.ShapeDtypeStruct((64, 32), dtype)
    x = jax.ShapeDtypeStruct((16, 32 if transposed else 64), dtype)
    for result in cusparselt.RESULTS[dtype]:

        def product(x, w, result=result):
            compressed = cusparselt.compress(w, transposed=transposed)
            return cusparselt.matmul(x, compressed, dtype=result)

        y = jax.eval_shape(product, x, w)
        assert (y.shape, y.dtype) == ((16, 64 if transposed else 32), result)
        text = cuda_text(product, x, w)
        assert text.count("@nmjax_cusparselt_compress") == 1
        assert text.count("@nmjax_cusparselt_matmul") == 1
        assert f"transposed = {str(transposed).lower()}" in text


def test_room_for_a_compressed_matrix():
    for size, width in ((4096, 2), (48, 2), (4096, 1)):
        dtype = np.dtype("int8" if width == 1 else "float16")
        values = size * size // 2
        needed = values * width + values * 2 // 8
        assert needed <= cusparselt.compressed_bytes((size, size), dtype)
    assert cusparselt.compressed_bytes((4096, 4096), np.dtype("float16")) < 0.57 * 2 * 4096**2


def test_a_packed_leaf_is_prepared_once():
    x, packed = jnp.ones((8, 32), jnp.bfloat16), packed_leaf()
    prepared = jax.eval_shape(cusparselt.prepare, packed)
    assert (prepared.shape, prepared.inputs, prepared.outputs) == ((32, 16), 32, 16)
    text = cuda_text(
        cusparselt.packed_matmul,
        x,
        packed,
        jnp.ones(16),
    )
    assert text.count("@nmjax_cusparselt_compress") == 1
    compressed = compressed_like()
    text = cuda_text(lambda x, w: cusparselt.matmul(x, w, jnp.ones(16), "relu"), x, compressed)
    assert "@nmjax_cusparselt_compress" not in text
    assert "relu = true" in text
    assert "tensor<16xbf16>" in text  # The bias.


def test_a_mapped_axis_joins_the_batch():
    xs = jnp.ones((3, 8, 32), jnp.bfloat16)
    text = cuda_text(jax.vmap(cusparselt.matmul, (0, None)), xs, compressed_like())
    assert text.count("@nmjax_cusparselt_matmul") == 1
    assert "tensor<24x32xbf16>" in text


def test_the_tuned_kernel_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("NMJAX_CACHE_DIR", str(tmp_path))
    x, w = jnp.ones((8, 32), jnp.bfloat16), compressed_like()
    assert "dense<[-1, 1, 0]>" in cuda_text(cusparselt.matmul, x, w)
    question = cusparselt._question(x, w, None, None, np.dtype(jnp.bfloat16))
    cusparselt.remember_algorithm(question, Algorithm(7, 2, 1, 500))
    text = cuda_text(lambda x, w: cusparselt.matmul(x, w), x, w)
    assert "dense<[7, 2, 1]>" in text
    assert "tensor<500xui8>" in text
    other = jnp.ones((16, 32), jnp.bfloat16)
    assert "dense<[-1, 1, 0]>" in cuda_text(lambda x, w: cusparselt.matmul(x, w), other, w)


X = jnp.ones((8, 32), jnp.bfloat16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cusparselt.compress(jnp.ones((32, 16))), "float32.*bfloat16"),
        (lambda: cusparselt.compress(jnp.ones((32, 8), jnp.bfloat16)), "multiples of 16"),
        (lambda: cusparselt.compress(jnp.ones((32, 16), jnp.int8)), "multiples of 32"),
        (lambda: cusparselt.compress(jnp.ones((32, 32), jnp.int8)), "transposed=True"),
        (lambda: cusparselt.compress(jnp.ones((2, 32, 16), jnp.bfloat16)), "one matrix"),
        (lambda: cusparselt.compress(jnp.ones((32, 16), jnp.bfloat16)), "128 groups.*axis -2"),
        (
            lambda: cusparselt.compress(jnp.ones((32, 16), jnp.bfloat16), transposed=True),
            "axis -1.*prune",
        ),
        (lambda: cusparselt.prepare(packed_leaf("3:4")), "3:4"),
        (lambda: cusparselt.prepare(packed_leaf(shape=(3, 3, 32, 16))), "one matrix"),
        (lambda: cusparselt.prepare(packed_leaf("2:4/kernel", (3, 3, 32, 16))), "one matrix"),
        (lambda: cusparselt.prepare(packed_leaf(dtype=jnp.float32)), "it takes bfloat16"),
        (lambda: cusparselt.matmul(X[:3], compressed_like()), "multiple of 8, not 3"),
        (lambda: cusparselt.matmul(X[:, :16], compressed_like()), r"\(batch, 32\)"),
        (lambda: cusparselt.matmul(X.astype(jnp.float16), compressed_like()), "same dtype"),
        (lambda: cusparselt.matmul(X, compressed_like(), dtype=jnp.float32), "not float32"),
        (
            lambda: nmjax.packed_matmul(X, packed_leaf(), implementation="cusparselt"),
            "not on an NVIDIA GPU",
        ),
        (
            lambda: nmjax.packed_matmul(X, packed_leaf("1x4@0.5"), implementation="cusparselt"),
            "1x4@0.5",
        ),
        (
            lambda: nmjax.packed_matmul(
                X.astype(jnp.float32), packed_leaf(), implementation="cusparselt"
            ),
            "both must be the same",
        ),
        (
            lambda: nmjax.packed_conv(
                jnp.ones((1, 4, 4, 32), jnp.bfloat16),
                packed_leaf(shape=(3, 3, 32, 16)),
                implementation="cusparselt",
            ),
            "not convolutions",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
