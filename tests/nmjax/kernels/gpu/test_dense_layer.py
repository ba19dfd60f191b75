"""A dense layer sparse along both axes, against its dense-masked definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.kernels.gpu import cusparselt, dense_layer
from nmjax.kernels.gpu.cusparselt_library import CusparseLt
from nmjax.kernels.gpu.dense_layer import _multiply, sparse_dense
from nmjax.masks.transposable import transposable_mask

VERSIONS = [
    (jnp.float32, jnp.float32, 1e-5),
    pytest.param(
        jnp.bfloat16,
        jnp.float32,
        1e-5,
        marks=pytest.mark.not_under("jax_numpy_dtype_promotion"),
    ),
    (jnp.bfloat16, jnp.bfloat16, 2e-2),
]


def numbers(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def by_definition(x, w, g):
    """Output and both gradients in float64, by NumPy."""
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    sparse = w * np.asarray(transposable_mask(jnp.asarray(w, jnp.float32)))
    inner = x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1])
    return x @ sparse, g @ sparse.T, inner


@pytest.mark.parametrize(("x_dtype", "w_dtype", "tolerance"), VERSIONS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 5)])
def test_it_is_what_it_is_defined_to_be(batch, x_dtype, w_dtype, tolerance):
    x, w, g = numbers((*batch, 16), x_dtype), numbers((16, 24), w_dtype, 1), numbers((*batch, 24))
    dtype = jnp.promote_types(x_dtype, w_dtype)
    y, pull = jax.vjp(jax.jit(sparse_dense), x, w)
    dx, dw = pull(g.astype(dtype))
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, x_dtype, w_dtype)
    for got, expected in zip((y, dx, dw), by_definition(x, w, g.astype(dtype)), strict=True):
        rounding = tolerance if got.dtype == dtype else 2e-2
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            got.astype(jnp.float32), expected, rtol=rounding, atol=rounding * scale
        )


def test_pruned_weights_learn():
    w = numbers((8, 8))
    dw = jax.grad(lambda w: sparse_dense(jnp.ones((2, 8)), w).sum())(w)
    np.testing.assert_array_equal(dw, np.full((8, 8), 2.0))


def test_a_mask_can_be_kept_for_some_steps():
    x, before, now = numbers((2, 8)), numbers((8, 8), seed=1), numbers((8, 8), seed=2)
    mask = transposable_mask(before)
    y, pull = jax.vjp(lambda w: sparse_dense(x, w, mask), now)
    np.testing.assert_allclose(y, x @ jnp.where(mask, now, 0), rtol=1e-5)
    np.testing.assert_allclose(pull(jnp.ones_like(y))[0], x.T @ jnp.ones_like(y), rtol=1e-5)
    np.testing.assert_array_equal(
        sparse_dense(x, before), sparse_dense(x, before, transposable_mask(before))
    )


def test_sparse_products_are_asked_for_the_right_way_round(monkeypatch):
    asked = []

    def compress(w, transposed):
        asked.append((w.shape, transposed))
        for axis in (-1, -2):  # 2:4 along both.
            groups = jnp.moveaxis(w, axis, -1).reshape(-1, 4)
            assert ((groups != 0).sum(axis=-1) <= 2).all()
        return w, transposed

    def matmul(x, compressed):
        w, transposed = compressed
        return x @ (w.T if transposed else w)

    x, w, g = numbers((8, 16)), numbers((16, 32), seed=1), numbers((8, 32), seed=2)
    expected, pull = jax.vjp(lambda x, w: sparse_dense(x, w, implementation="xla"), x, w)
    monkeypatch.setattr(cusparselt, "compress_unchecked", compress)
    monkeypatch.setattr(cusparselt, "matmul", matmul)
    sparse = jnp.where(transposable_mask(w), w, 0)
    y, pull_sparse = jax.vjp(lambda x, w: _multiply("cusparselt", x, w), x, sparse)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(pull_sparse(g), pull(g), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert asked == [((16, 32), False), ((16, 32), True)]


def test_who_asks_for_them_gets_sparse_products(monkeypatch):
    monkeypatch.setattr(cusparselt, "load_cusparselt", lambda: CusparseLt("0"))
    monkeypatch.setattr(dense_layer, "check_gpu", lambda: None)
    asked = partial(sparse_dense, implementation="cusparselt")
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 32), (32, 16)))

    def lowered(function):
        return jax.jit(function).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()

    text = lowered(lambda x, w: (jax.grad(lambda w: asked(x, w).sum())(w), asked(x, w)))
    assert "@nmjax_cusparselt_matmul" in text
    assert "transposed = true" not in text  # Nothing asks for the gradient of x.
    both = jax.grad(lambda x, w: asked(x, w).sum(), argnums=(0, 1))
    assert "transposed = true" in lowered(both)
    assert "nmjax_cusparselt" not in lowered(sparse_dense)
    with pytest.raises(NotImplementedError, match=r"cannot multiply \(3, 32\)"):
        asked(jnp.ones((3, 32), jnp.bfloat16), jnp.ones((32, 16), jnp.bfloat16))


def test_a_layer_learns():
    w_true, x = numbers((16, 16)), numbers((64, 16), seed=1)
    y = x @ jnp.where(transposable_mask(w_true), w_true, 0)

    @jax.jit
    def step(w):
        return w - 0.1 * jax.grad(lambda w: jnp.mean((sparse_dense(x, w) - y) ** 2))(w)

    w = numbers((16, 16), seed=2)
    start = jnp.mean((sparse_dense(x, w) - y) ** 2)
    for _ in range(100):
        w = step(w)
    assert jnp.mean((sparse_dense(x, w) - y) ** 2) < start / 2


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: sparse_dense(jnp.ones((2, 8), int), jnp.ones((8, 8))), TypeError, "floating"),
        (lambda: sparse_dense(jnp.ones((2, 8)), jnp.ones((8, 8), int)), TypeError, "floating"),
        (lambda: sparse_dense(jnp.ones((2, 4)), jnp.ones((8, 8))), ValueError, r"\(2, 4\)"),
        (
            lambda: sparse_dense(jnp.ones((2, 8)), jnp.ones((8, 8)), jnp.ones((8, 4), bool)),
            ValueError,
            r"mask.*\(8, 4\)",
        ),
        (
            lambda: sparse_dense(jnp.ones((2, 8)), jnp.ones((8, 8)), jnp.ones((8, 8))),
            TypeError,
            "boolean",
        ),
        (lambda: sparse_dense(jnp.ones((2, 8)), jnp.ones((8, 6))), ValueError, "do not fit"),
        (
            lambda: sparse_dense(jnp.ones((2, 8)), jnp.ones((8, 8)), implementation="cuda"),
            ValueError,
            "cuda",
        ),
        (
            lambda: sparse_dense(jnp.ones((2, 8)), jnp.ones((8, 8)), implementation="cusparselt"),
            NotImplementedError,
            r"cannot multiply \(2, 8\) by \(8, 8\)",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
