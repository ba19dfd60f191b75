"""Gradients of the straight-through pruning functions, against the formulas in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import nmjax

DTYPES = ["float32", "bfloat16", "float16"]
LAMBDA = 0.25

RNG = np.random.default_rng(0)
W = RNG.normal(size=(8, 6)).astype(np.float32)
MASK = RNG.random(size=W.shape) < 0.5
C = RNG.normal(size=W.shape).astype(np.float32)


def loss_ste(w, mask=MASK):
    """Quadratic in the sparse weights, so that its cotangent C + sparse w depends on them."""
    s = nmjax.prune_ste(w, mask)
    return jnp.sum(C.astype(s.dtype) * s + 0.5 * s**2)


def loss_sr_ste(w, lambda_w=LAMBDA, mask=MASK):
    s = nmjax.prune_sr_ste(w, mask, lambda_w)
    return jnp.sum(C.astype(s.dtype) * s + 0.5 * s**2)


def gradient(w, lambda_w=0.0, mask=MASK, c=C):
    """The formula: the cotangent everywhere, and the pull where the mask is False."""
    return c + w * mask + lambda_w * w * ~mask


# Forward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prune", [nmjax.prune_ste, lambda w, m: nmjax.prune_sr_ste(w, m, LAMBDA)])
def test_forward_is_the_masked_weight(prune, dtype):
    w = jnp.asarray(W, dtype)
    out = prune(w, MASK)
    assert out.dtype == w.dtype
    np.testing.assert_array_equal(out, np.where(MASK, w, 0))


@pytest.mark.not_under("jax_debug_nans")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pruned_non_finite_weights_do_not_leak_forward(bad):
    w = np.where(MASK, W, np.float32(bad))
    np.testing.assert_array_equal(nmjax.prune_ste(w, MASK), W * MASK)
    np.testing.assert_array_equal(nmjax.prune_sr_ste(w, MASK, LAMBDA), W * MASK)


def test_pruned_non_finite_weights_do_not_leak_into_other_gradients():
    w = W.copy()
    row, column = np.argwhere(~MASK)[0]
    w[row, column] = np.inf
    expected = gradient(W, LAMBDA)
    expected[row, column] = np.inf  # the pull on that weight itself, and nothing else
    np.testing.assert_allclose(jax.grad(loss_sr_ste)(w), expected, rtol=1e-6)
    expected = gradient(W)
    expected[row, column] = C[row, column]
    np.testing.assert_allclose(jax.grad(loss_ste)(w), expected, rtol=1e-6)


@pytest.mark.not_under("jax_debug_nans")
def test_kept_non_finite_weights_stay_visible():
    w = np.where(MASK, np.float32(np.nan), W)
    assert np.isnan(nmjax.prune_ste(w, MASK)).sum() == MASK.sum()


# Gradient


def test_ste_gradient_is_the_cotangent_everywhere():
    np.testing.assert_allclose(jax.grad(loss_ste)(W), gradient(W), rtol=1e-6)


@pytest.mark.parametrize("lambda_w", [2e-4, 0.25, 0.0, -0.5, 1, np.float32(0.5)])
def test_sr_ste_gradient_adds_the_pull_on_pruned_weights(lambda_w):
    np.testing.assert_allclose(jax.grad(loss_sr_ste)(W, lambda_w), gradient(W, lambda_w), rtol=1e-6)


def test_zero_lambda_is_ste():
    np.testing.assert_array_equal(jax.grad(loss_sr_ste)(W, 0.0), jax.grad(loss_ste)(W))


@pytest.mark.parametrize("kept", [True, False])
def test_all_kept_and_all_pruned(kept):
    mask = np.full(W.shape, kept)
    np.testing.assert_allclose(
        jax.grad(loss_sr_ste)(W, LAMBDA, mask), gradient(W, LAMBDA, mask), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_keeps_the_dtype(dtype):
    w = jnp.asarray(W, dtype)
    for grad in (jax.grad(loss_ste)(w), jax.grad(loss_sr_ste)(w)):
        assert grad.dtype == w.dtype
    lambda_w = jnp.asarray(LAMBDA, "float32")  # a wider strength must not widen the gradient
    cotangent = jnp.asarray(C, dtype)
    _, pullback = jax.vjp(lambda w: nmjax.prune_sr_ste(w, MASK, lambda_w), w)
    (grad,) = pullback(cotangent)
    assert grad.dtype == w.dtype
    # Summed by hand in the same dtype: exact, since LAMBDA is a power of two.
    np.testing.assert_array_equal(grad, cotangent + jnp.where(MASK, 0, LAMBDA * w))


def test_no_gradient_to_lambda_nor_to_the_mask():
    assert jax.grad(loss_sr_ste, argnums=1)(W, LAMBDA) == 0
    grad = jax.grad(loss_sr_ste, argnums=2, allow_int=True)(W, LAMBDA, MASK)
    assert grad.dtype == jax.dtypes.float0


def test_weights_with_no_entries():
    empty = jnp.zeros((0, 4))
    grad = jax.grad(lambda w: nmjax.prune_sr_ste(w, jnp.zeros((0, 4), bool), 0.1).sum())(empty)
    assert grad.shape == (0, 4)


# Under transformations


TRANSFORMS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "jit of remat": lambda f: jax.jit(jax.checkpoint(f)),
    "remat saving nothing": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.nothing_saveable
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradient_under(name):
    f = TRANSFORMS[name](loss_sr_ste)
    np.testing.assert_allclose(jax.grad(f)(W), gradient(W, LAMBDA), rtol=1e-6)
    f = TRANSFORMS[name](loss_ste)
    np.testing.assert_allclose(jax.grad(f)(W), gradient(W), rtol=1e-6)


def test_gradient_under_vmap():
    ws = np.stack([W, 2 * W, -W])
    masks = np.stack([MASK, ~MASK, MASK])
    lambdas = np.array([0.1, 0.2, 0.3], np.float32)
    expected = [gradient(*args) for args in zip(ws, lambdas, masks, strict=True)]
    grads = jax.vmap(jax.grad(loss_sr_ste))(ws, lambdas, masks)
    np.testing.assert_allclose(grads, np.stack(expected), rtol=1e-6)
    # One mask and one strength for all, and the gradient outside of the vmap.
    total = jax.grad(lambda ws: jax.vmap(loss_sr_ste)(ws).sum())(ws)
    np.testing.assert_allclose(total, [gradient(w, LAMBDA) for w in ws], rtol=1e-6)


def test_gradient_through_scan_adds_one_pull_for_each_use():
    def loss(w):
        def body(total, c):
            return total + jnp.sum(c * nmjax.prune_sr_ste(w, MASK, LAMBDA)), None

        return jax.lax.scan(body, 0.0, jnp.stack([C, 2 * C, 3 * C]))[0]

    np.testing.assert_allclose(jax.grad(loss)(W), 6 * C + 3 * LAMBDA * W * ~MASK, rtol=1e-5)


def test_scan_over_layers():
    ws, masks = np.stack([W, 2 * W]), np.stack([MASK, ~MASK])

    def loss(ws):
        def body(total, layer):
            return total + loss_sr_ste(layer[0], LAMBDA, layer[1]), None

        return jax.lax.scan(body, 0.0, (ws, masks))[0]

    expected = np.stack([gradient(w, LAMBDA, m) for w, m in zip(ws, masks, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(ws), expected, rtol=1e-6)


def test_grad_of_grad():
    """The Hessian of the surrogate: 1 where kept; where pruned, lambda_w."""
    expected = np.diag(np.where(MASK, 1.0, LAMBDA).ravel())
    size = W.size
    reverse = jax.jacrev(jax.grad(loss_sr_ste))(W).reshape(size, size)
    np.testing.assert_allclose(reverse, expected, atol=1e-6)
    forward = jax.hessian(loss_sr_ste)(W).reshape(size, size)
    np.testing.assert_allclose(forward, expected, atol=1e-6)
    ste = jax.jacrev(jax.grad(loss_ste))(W).reshape(size, size)
    np.testing.assert_allclose(ste, np.diag(MASK.ravel().astype(np.float32)), atol=1e-6)


def test_gradient_of_the_kept_weights_is_the_true_one():
    """Where nothing is pruned there is nothing to estimate, so finite differences must agree."""
    mask = np.ones(W.shape, bool)
    check_grads(lambda w: loss_ste(w, mask), (W,), order=2, modes=["rev"], rtol=1e-2)
    check_grads(lambda w: loss_sr_ste(w, LAMBDA, mask), (W,), order=2, modes=["rev"], rtol=1e-2)


def test_mask_computed_from_the_weight_inside_the_gradient():
    def loss(w):
        return loss_sr_ste(w, LAMBDA, nmjax.nm_mask(w, 2, 4))

    mask = np.asarray(nmjax.nm_mask(W, 2, 4))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(W), gradient(W, LAMBDA, mask), rtol=1e-6)


# Compilation


def test_scheduled_lambda_compiles_once():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(w, count):
        return jax.grad(loss_sr_ste)(w, 1e-3 * count)

    for count in range(5):
        np.testing.assert_allclose(step(W, count), gradient(W, 1e-3 * count), rtol=1e-6)


def test_numbers_passed_as_lambda_compile_once():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(w, lambda_w):
        return jax.grad(loss_sr_ste)(w, lambda_w)

    for lambda_w in (0.1, 0.2, -0.3):
        step(W, lambda_w)


class TestVariants(chex.TestCase):
    """Arrays on a device or from NumPy, compiled or not, give the same values."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_prune_ste(self):
        pruned = self.variant(nmjax.prune_ste)(np.asarray(W), np.asarray(MASK))
        chex.assert_trees_all_equal(pruned, W * MASK)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_prune_sr_ste(self):
        gradient = jax.grad(lambda w, mask: nmjax.prune_sr_ste(w, mask, 0.5).sum())
        pulled = self.variant(gradient)(np.asarray(W), np.asarray(MASK))
        chex.assert_trees_all_close(pulled, 1 + 0.5 * ~MASK * W)


# Errors


PRUNES = {
    "ste": nmjax.prune_ste,
    "sr_ste": lambda w, mask: nmjax.prune_sr_ste(w, mask, LAMBDA),
}


@pytest.mark.parametrize("name", PRUNES)
@pytest.mark.parametrize("shape", [(6, 8), (8, 1), (6,), (), (1, 8, 6)])
def test_mask_of_another_shape(name, shape):
    with pytest.raises(ValueError, match=r"mask .*shape .*\(8, 6\)"):
        PRUNES[name](W, np.ones(shape, bool))


@pytest.mark.parametrize("name", PRUNES)
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8"])
def test_mask_of_another_dtype(name, dtype):
    with pytest.raises(TypeError, match=rf"{dtype}.*True = kept"):
        PRUNES[name](W, MASK.astype(dtype))


@pytest.mark.parametrize("shape", [(1,), (6,), (8, 6)])
def test_lambda_that_is_no_scalar(shape):
    with pytest.raises(ValueError, match=r"lambda_w must be a scalar, got .*shape"):
        nmjax.prune_sr_ste(W, MASK, np.ones(shape))


def test_errors_come_at_trace_time_too():
    with pytest.raises(TypeError, match="masks are boolean"):
        jax.jit(nmjax.prune_ste)(W, MASK.astype("float32"))
