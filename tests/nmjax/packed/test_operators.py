"""`x @ packed`, `packed @ x` and transposes against NumPy, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax

PATTERNS = ["2:4", "1x4@0.5", "1x4@0.5/layer"]
INPUTS_FIRST = nmjax.Axes((-2,), (-1,))
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(16, 32)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(2, 5, 16)), jnp.float32)


def packed_weight(pattern, w=W, axes=INPUTS_FIRST):
    params = {"kernel": w}
    plan = nmjax.make_plan(params, pattern, axes={"kernel": axes})
    return nmjax.pack(nmjax.prune(params, plan), plan)["kernel"]


def outputs_first(pattern):
    """A matrix (outputs, inputs), as Equinox and PyTorch have it."""
    return packed_weight(pattern, W.T, nmjax.Axes((-1,), (-2,)))


def exact(x):
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("x", [X, X[0], X[0, 0]], ids=["stack", "matrix", "vector"])
def test_inputs_first(pattern, x):
    packed = packed_weight(pattern)
    dense = exact(packed.unpack())
    expected = exact(x) @ dense
    for y in (x @ packed, np.asarray(x) @ packed, jax.jit(lambda x, w: x @ w)(x, packed)):
        assert isinstance(y, jax.Array)
        np.testing.assert_allclose(y, expected, atol=1e-5)
    columns = x if x.ndim == 1 else x.mT
    np.testing.assert_allclose(packed.T @ columns, dense.T @ exact(columns), atol=1e-5)
    np.testing.assert_array_equal(x @ packed, nmjax.packed_matmul(x, packed))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("x", [X, X[0], X[0, 0]], ids=["stack", "matrix", "vector"])
def test_outputs_first(pattern, x):
    packed = outputs_first(pattern)
    dense = exact(packed.unpack())
    columns = x if x.ndim == 1 else x.mT
    for y in (packed @ columns, packed @ np.asarray(columns)):
        np.testing.assert_allclose(y, dense @ exact(columns), atol=1e-5)
    np.testing.assert_allclose(x @ packed.T, exact(x) @ dense.T, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_transposes_hold_the_same_arrays(pattern):
    packed = packed_weight(pattern)
    turned = packed.T
    assert turned.shape == (32, 16)
    assert turned.values is packed.values
    turned.check_arrays()
    np.testing.assert_array_equal(turned.unpack(), packed.unpack().T)
    assert turned.T.leaf_plan == packed.leaf_plan
    stack = packed_weight(pattern, jnp.stack([W, 2 * W]))
    np.testing.assert_array_equal(stack.mT.unpack(), stack.unpack().mT)
    mapped = jax.vmap(lambda w, x: w.T @ x)(stack, X[:, 0])
    np.testing.assert_allclose(
        mapped, np.einsum("lio,li->lo", exact(stack.unpack()), exact(X[:, 0])), atol=1e-5
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_of_operators(pattern):
    packed = packed_weight(pattern)
    g = jnp.asarray(RNG.normal(size=(5, 32)), jnp.float32)

    def loss(x, values):
        return jnp.vdot(x @ packed.with_values(values), g)

    by_x, by_values = jax.grad(loss, argnums=(0, 1))(X[0], packed.values)
    np.testing.assert_allclose(by_x, exact(g) @ exact(packed.unpack()).T, atol=1e-4)
    dense = exact(X[0]).T @ exact(g)
    # The gradient of each kept value is the dense one at its place.
    placed = exact(packed.with_values(by_values).unpack())
    np.testing.assert_allclose(placed, np.where(packed.unpack() != 0, dense, 0), atol=1e-4)


def test_an_equinox_network_runs_packed():
    eqx = pytest.importorskip("equinox")
    network = eqx.nn.MLP(16, 8, 32, 2, key=jax.random.key(0))
    rows = X[0]
    for pattern in ("2:4", "1x4@0.5"):
        plan = nmjax.make_plan(eqx.filter(network, eqx.is_inexact_array), pattern)
        assert len(plan) == 3
        pruned = nmjax.prune(network, plan)
        packed = nmjax.pack(pruned, plan)
        got = eqx.filter_jit(eqx.filter_vmap(packed))(rows)
        np.testing.assert_allclose(got, jax.vmap(pruned)(rows), atol=1e-6)
        grads = eqx.filter_grad(lambda packed: jax.vmap(packed)(rows).sum())(packed)
        dense = eqx.filter_grad(lambda pruned: jax.vmap(pruned)(rows).sum())(pruned)
        np.testing.assert_allclose(grads.layers[0].bias, dense.layers[0].bias, rtol=1e-4, atol=1e-5)


# What is refused


@pytest.mark.parametrize("packed", [packed_weight("2:4"), packed_weight("1x4@0.5")])
@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: jnp.einsum("bi,io->bo", x, w),
        lambda x, w: jnp.dot(x, w),
        lambda x, w: jnp.matmul(x, w),
        lambda x, w: jnp.tensordot(x, w, 1),
        lambda x, w: jnp.sum(w),
        lambda x, w: jnp.asarray(w),
        lambda x, w: np.asarray(w),
        lambda x, w: jax.lax.dot(x, w),
        lambda x, w: jax.jit(lambda x: jnp.einsum("bi,io->bo", x, w))(x),
    ],
)
def test_functions_of_arrays_say_what_to_do(packed, use):
    with pytest.raises(TypeError, match=r"x @ packed or nmjax\.packed_matmul.*nmjax\.unpack"):
        use(X[0], packed)


@pytest.mark.parametrize(
    ("use", "error", "words"),
    [
        (lambda: X @ packed_weight("2:4").T, ValueError, r"inputs along axis -1: use x @ packed.T"),
        (lambda: packed_weight("2:4") @ X.mT, ValueError, r"along axis -2: use packed.T @ x"),
        (lambda: X[..., :8] @ packed_weight("2:4"), ValueError, r"\(2, 5, 8\).*\(16,\)"),
        (lambda: X @ packed_weight("2:4", jnp.stack([W, W])), ValueError, "jax.vmap"),
        (lambda: packed_weight("2:4", jnp.stack([W, W])).T, ValueError, "jax.vmap"),
        (lambda: packed_weight("2:4") @ packed_weight("2:4"), TypeError, "two packed weights"),
        (lambda: [1.0] @ packed_weight("2:4"), TypeError, "unsupported operand"),
        (lambda: packed_weight("2:4") @ "x", TypeError, "unsupported operand"),
        (lambda: packed_weight("2:4") + 1, TypeError, "unsupported operand"),
        (lambda: X.astype(int) @ packed_weight("2:4"), TypeError, "x must be floating"),
    ],
)
def test_operands_that_are_refused(use, error, words):
    with pytest.raises(error, match=words):
        use()


def test_kernels_of_attention_are_not_transposed():
    heads = {"query": {"kernel": jnp.ones((16, 4, 8))}}
    axes = nmjax.Axes((-3,), (-2, -1))
    plan = nmjax.make_plan(heads, "2:4", axes={"kernel": axes})
    packed = nmjax.pack(nmjax.prune(heads, plan), plan)["query"]["kernel"]
    with pytest.raises(ValueError, match=r"only matrices are transposed packed"):
        _ = packed.mT
    with pytest.raises(ValueError, match=r"\(16, 4, 8\) is not one matrix: use nmjax\.packed_"):
        _ = jnp.ones((2, 16)) @ packed
