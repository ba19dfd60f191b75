"""What cuSPARSELt is given and refused, and what XLA is asked to call; no GPU is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax
from nmjax.kernels.gpu import cusparselt
from nmjax.kernels.gpu.algorithms import Algorithm
from nmjax.kernels.gpu.cusparselt_library import CusparseLt
from nmjax.kernels.gpu.cusparselt_limits import RESULTS, compressed_bytes
from tests.nmjax.packed_weights import prune_and_pack


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """As on a machine that has cuSPARSELt."""
    monkeypatch.setattr(cusparselt, "load_cusparselt", lambda: CusparseLt("1.2.3"))


def packed_leaf(pattern="2:4", shape=(32, 16), dtype=jnp.bfloat16):
    params = {"kernel": jnp.ones(shape, dtype)}
    axes = nmjax.Axes((-2,), (-1,), tuple(range(-len(shape), -2)))
    return prune_and_pack(params, nmjax.make_plan(params, pattern, axes={"kernel": axes}))["kernel"]


def compressed_like(shape=(32, 16), transposed=False, dtype="bfloat16"):
    dtype = np.dtype(jnp.dtype(dtype))
    data = jnp.zeros(compressed_bytes(shape, dtype), jnp.uint8)
    return cusparselt.Compressed(data, shape, transposed, dtype)


def cuda_text(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float8_e4m3fn"])
def test_every_dtype_gets_its_results(dtype):
    transposed = dtype in ("int8", "float8_e4m3fn")
    w = jax.ShapeDtypeStruct((64, 32), dtype)
    x = jax.ShapeDtypeStruct((16, 32 if transposed else 64), dtype)
    for result in RESULTS[dtype]:

        def product(x, w, result=result):
            compressed = cusparselt.compress(w, transposed=transposed)
            return cusparselt.matmul(x, compressed, dtype=result)

        y = jax.eval_shape(product, x, w)
        assert (y.shape, y.dtype) == ((16, 64 if transposed else 32), result)
        text = cuda_text(product, x, w)
        assert text.count("@nmjax_cusparselt_compress") == 1
        assert text.count("@nmjax_cusparselt_matmul") == 1
        assert f"transposed = {str(transposed).lower()}" in text


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
    assert 'activation = "relu"' in text
    assert "tensor<16xbf16>" in text  # The bias.


def test_a_mapped_axis_joins_the_batch():
    xs = jnp.ones((3, 8, 32), jnp.bfloat16)
    text = cuda_text(jax.vmap(cusparselt.matmul, (0, None)), xs, compressed_like())
    assert text.count("@nmjax_cusparselt_matmul") == 1
    assert "tensor<24x32xbf16>" in text


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("batch", "rows"), [(32, 8), (48, 48)])
def test_devices_share_a_batch_where_each_gets_rows_enough(monkeypatch, batch, rows, with_bias):
    """Steps of 8 rows: 4 devices have one each; of 6 steps none has a part."""
    asked = []

    def stand_in(name, results):
        def multiply(x, data, bias, **attributes):
            asked.append(x.shape)
            x, data = x.astype(jnp.float32), data.astype(jnp.float32)
            y = jnp.zeros(results[0].shape) + x.sum(axis=1, keepdims=True) + data.sum()
            y += bias.astype(jnp.float32)[None] if bias.size else 0
            return y.astype(results[0].dtype), jnp.zeros(results[1].shape, jnp.uint8)

        return multiply

    monkeypatch.setattr(cusparselt.jax.ffi, "ffi_call", stand_in)
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    by_rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x = jax.device_put(jnp.arange(batch * 32.0).reshape(batch, 32) % 5, by_rows)
    x = x.astype(jnp.bfloat16)
    w, bias = jax.device_put((compressed_like(), jnp.arange(16.0) if with_bias else None), whole)
    y = jax.jit(cusparselt.matmul)(x, w, bias)
    assert asked[-1] == (rows, 32)
    expected = np.asarray(x, float).sum(axis=1, keepdims=True) + np.zeros(16)
    np.testing.assert_array_equal(np.asarray(y, float), expected + (np.arange(16) * with_bias))
    if rows < batch:
        assert y.sharding.is_equivalent_to(by_rows, 2)


def test_integers_have_a_bias_of_float32_and_gelu():
    x = jnp.ones((16, 64), jnp.int8)
    compressed = compressed_like((32, 64), True, "int8")

    def product(x, w):
        return cusparselt.matmul(x, w, jnp.ones(32, jnp.bfloat16), "gelu", dtype="int8")

    text = cuda_text(product, x, compressed)
    assert "tensor<32xf32>, tensor<" not in text  # An operand, and of no result.
    assert "tensor<32xf32>)" in text
    assert 'activation = "gelu"' in text


def test_the_tuned_kernel_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("NMJAX_CACHE_DIR", str(tmp_path))
    x, w = jnp.ones((8, 32), jnp.bfloat16), compressed_like()
    multiply = jax.jit(lambda x, w: cusparselt.matmul(x, w))
    assert "dense<[-1, 1, 0]>" in cuda_text(lambda x, w: multiply(x, w), x, w)
    question = cusparselt._question(x, w, None, None, np.dtype(jnp.bfloat16))
    cusparselt.remember_algorithm(question, Algorithm(7, 2, 1, 500))
    text = cuda_text(lambda x, w: cusparselt.matmul(x, w), x, w)
    assert "dense<[7, 2, 1]>" in text
    assert "tensor<500xui8>" in text
    other = jnp.ones((16, 32), jnp.bfloat16)
    assert "dense<[-1, 1, 0]>" in cuda_text(lambda x, w: cusparselt.matmul(x, w), other, w)


class Searched:
    """Stands for our compiled calls after a search."""

    version, reason = "1.2.3", ""

    def __init__(self):
        self.searches = 0

    def found(self):
        self.searches += 1
        return Algorithm(self.searches, 1, 0, 100)


def test_a_product_is_searched_once(monkeypatch, tmp_path):
    monkeypatch.setenv("NMJAX_CACHE_DIR", str(tmp_path))
    library = Searched()
    monkeypatch.setattr(cusparselt, "load_cusparselt", lambda: library)
    monkeypatch.setattr(cusparselt, "check_gpu", lambda dtype: None)
    monkeypatch.setattr(cusparselt, "_call", lambda *arguments: jnp.zeros(()))
    x, w = jnp.ones((8, 32), jnp.bfloat16), compressed_like()
    for _ in range(2):
        cusparselt.tune(x, w)
        assert library.searches == 1
    cusparselt.tune(x, w, activation="relu")
    cusparselt.tune(x, w, again=True)
    assert library.searches == 3
    question = cusparselt._question(x, w, None, None, np.dtype(jnp.bfloat16))
    assert cusparselt.known_algorithm(question).config == 3
    with pytest.raises(NotImplementedError, match=r"\(3, 32\).*multiple of 8"):
        cusparselt.tune(x[:3], w)


X = jnp.ones((8, 32), jnp.bfloat16)
CANNOT = NotImplementedError


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: cusparselt.compress(jnp.ones((32, 16), jnp.float32)), CANNOT, "float32.*bfloat16"),
        (
            lambda: cusparselt.compress(jnp.ones((32, 8), jnp.bfloat16)),
            CANNOT,
            "multiples of 16",
        ),
        (
            lambda: cusparselt.compress(jnp.ones((32, 16), jnp.int8)),
            CANNOT,
            "multiples of 32",
        ),
        (
            lambda: cusparselt.compress(jnp.ones((32, 32), jnp.int8)),
            CANNOT,
            "transposed=True",
        ),
        (
            lambda: cusparselt.compress(jnp.ones((2, 32, 16), jnp.bfloat16)),
            CANNOT,
            "one matrix",
        ),
        (lambda: cusparselt.prepare(packed_leaf("3:4")), CANNOT, "3:4"),
        (
            lambda: cusparselt.prepare(packed_leaf(shape=(3, 3, 32, 16))),
            CANNOT,
            "one matrix",
        ),
        (
            lambda: cusparselt.prepare(packed_leaf("2:4/kernel", (3, 3, 32, 16))),
            CANNOT,
            "one matrix",
        ),
        (
            lambda: cusparselt.prepare(packed_leaf(dtype=jnp.float32)),
            CANNOT,
            "it takes bfloat16",
        ),
        (
            lambda: cusparselt.matmul(X[:3], compressed_like()),
            CANNOT,
            "multiple of 8, not 3",
        ),
        (lambda: cusparselt.matmul(X[:, :16], compressed_like()), ValueError, r"\(batch, 32\)"),
        (
            lambda: cusparselt.matmul(X.astype(jnp.float16), compressed_like()),
            ValueError,
            "same dtype",
        ),
        (
            lambda: cusparselt.matmul(X, compressed_like(), dtype=jnp.float32),
            CANNOT,
            "not float32",
        ),
        (lambda: cusparselt.matmul(X, compressed_like(), activation="tanh"), ValueError, "'tanh'"),
        (
            lambda: cusparselt.matmul(X, compressed_like(), activation="gelu"),
            CANNOT,
            "jax.nn.gelu",
        ),
        (
            lambda: cusparselt.matmul(X, compressed_like(), jnp.ones(8)),
            ValueError,
            r"\(8,\), expected \(16,\)",
        ),
        (
            lambda: cusparselt.matmul(X, compressed_like()),
            CANNOT,
            "not on an NVIDIA GPU",
        ),
        (
            lambda: cusparselt.compress(jnp.zeros((32, 16), jnp.bfloat16)),
            CANNOT,
            "not on an NVIDIA GPU",
        ),
        (
            lambda: nmjax.packed_matmul(X, packed_leaf(), implementation="cusparselt"),
            CANNOT,
            "not on an NVIDIA GPU",
        ),
        (
            lambda: nmjax.packed_matmul(X, packed_leaf("1x4@0.5"), implementation="cusparselt"),
            CANNOT,
            "1x4@0.5",
        ),
        (
            lambda: nmjax.packed_matmul(
                X.astype(jnp.float32), packed_leaf(), implementation="cusparselt"
            ),
            CANNOT,
            "same dtype",
        ),
        (
            lambda: nmjax.packed_conv(
                jnp.ones((1, 4, 4, 32), jnp.bfloat16),
                packed_leaf(shape=(3, 3, 32, 16)),
                implementation="cusparselt",
            ),
            CANNOT,
            "one matrix",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_weight_that_is_not_2_4_is_refused(monkeypatch):
    monkeypatch.setattr(cusparselt, "check_gpu", lambda dtype: None)
    w = jnp.ones((32, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"128 groups.*axis -2"):
        cusparselt.compress(w)
    with pytest.raises(ValueError, match=r"axis -1.*prune"):
        cusparselt.compress(w, transposed=True)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(cusparselt, "load_cusparselt", lambda: CusparseLt(None, "not there"))
    for call in (
        lambda: cusparselt.compress(jnp.ones((32, 16), jnp.bfloat16)),
        lambda: cusparselt.prepare(packed_leaf()),
        lambda: cusparselt.matmul(X, compressed_like()),
        lambda: cusparselt.tune(X, compressed_like()),
        lambda: nmjax.packed_matmul(X, packed_leaf(), implementation="cusparselt"),
    ):
        with pytest.raises(NotImplementedError, match="not there"):
            call()
