"""Sparse linen modules read their axes off the program of the call, wherever a module can stand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax import linen
from tests.nmjax.linen.test_plans import OutIn

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 8))


def pruned(kernel, axis):
    return jnp.where(nmjax.nm_mask(kernel, 2, 4, axis=axis), kernel, 0)


def expected(kernel, x=X):
    return x @ pruned(kernel, -1).T


SPARSE = linen.sparsify(OutIn(12), "2:4")
VARIABLES = SPARSE.init(KEY, X)
KERNEL = VARIABLES["params"]["kernel"]


def test_a_layer_whose_name_misleads_is_pruned_along_its_inputs():
    result = SPARSE.apply(VARIABLES, X)
    np.testing.assert_array_equal(result, expected(KERNEL))
    assert (result != X @ pruned(KERNEL, -2).T).any()
    np.testing.assert_allclose(jax.jit(SPARSE.apply)(VARIABLES, X), result, atol=1e-6)


def test_the_gradient_is_straight_through():
    gradient = jax.grad(lambda v: (SPARSE.apply(v, X) ** 2).sum())(VARIABLES)["params"]["kernel"]
    np.testing.assert_allclose(gradient, 2 * expected(KERNEL).T @ X, rtol=1e-4, atol=1e-5)


class Layer(nn.Module):
    sparse: bool

    def setup(self):
        layer = OutIn(8)
        self.layer = linen.sparsify(layer, "2:4") if self.sparse else layer

    def __call__(self, x, _=None):
        return nn.tanh(self.layer(x)), None


def scanned(axis, **fields):
    axes = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}}
    return nn.scan(nn.remat(Layer), length=3, **axes)(**fields)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("around", [False, True])
def test_in_setup_under_scan_and_remat(axis, around):
    """The sparse module is the scan itself, or a part of the scanned layer."""
    dense = scanned(axis, sparse=False)
    variables = dense.init(KEY, X)
    sparse = linen.sparsify(dense, "2:4") if around else scanned(axis, sparse=True)

    def loss(apply):
        return jax.jit(jax.value_and_grad(lambda v: (apply(v, X)[0] ** 2).sum()))(variables)

    def explicit(v, x):
        for kernel in jnp.moveaxis(v["params"]["layer"]["kernel"], axis, 0):
            x = nn.tanh(x @ nmjax.prune_ste(kernel, nmjax.nm_mask(kernel, 2, 4, axis=-1)).T)
        return x, None

    result, truth = loss(sparse.apply), loss(explicit)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4), result, truth)


def test_a_plan_is_checked():
    wrong = nmjax.make_plan(VARIABLES["params"], "2:4", axes={"kernel": -2})
    right = linen.make_plan(OutIn(12), "2:4", X)
    sparse = linen.sparsify(OutIn(12), wrong)
    assert sparse.init(KEY, X).keys() == {"params"}
    for apply in (sparse.apply, jax.jit(sparse.apply)):
        with pytest.raises(ValueError, match=r"kernel \(12, 8\): planned along -2, but .* over -1"):
            apply(VARIABLES, X)
    np.testing.assert_array_equal(
        linen.sparsify(OutIn(12), right).apply(VARIABLES, X), expected(KERNEL)
    )


@pytest.mark.parametrize("as_plan", [False, True])
def test_each_shape_is_traced_once(as_plan):
    calls = []

    class Counted(nn.Module):
        features: int = 12

        @nn.compact
        def __call__(self, x, scale=1, name=None):
            calls.append(x.shape)
            return scale * OutIn(self.features)(x)

    variables = Counted().init(KEY, X)
    plan = linen.make_plan(Counted(), "2:4", X) if as_plan else "2:4"
    sparse = linen.sparsify(Counted(), plan)

    def number(*args, **kwargs):
        calls.clear()
        sparse.apply(variables, *args, **kwargs)
        return len(calls)

    assert number(X) == 2
    assert [number(X + i) for i in range(3)] == [1, 1, 1]
    assert number(X[:2]) == 2
    assert [number(X, 2), number(X, 2), number(X, 3)] == [2, 1, 2]
    # What cannot be hashed is traced each time.
    assert [number(X, name={1}), number(X, name={1})] == [2, 2]


def test_copies_with_other_fields_are_traced_again():
    class Either(nn.Module):
        out_in: bool

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(), (8, 8))
            return x @ (kernel.T if self.out_in else kernel)

    sparse = linen.sparsify(Either(out_in=True), "2:4")
    variables = sparse.init(KEY, X)
    kernel = variables["params"]["kernel"]
    np.testing.assert_array_equal(sparse.apply(variables, X), expected(kernel))
    other = sparse.clone(out_in=False)
    np.testing.assert_array_equal(other.apply(variables, X), X @ pruned(kernel, -2))


class Autoencoder(nn.Module):
    def setup(self):
        self.inner, self.outer, self.plain = OutIn(16), OutIn(8), nn.Dense(4)

    def encode(self, x):
        return self.inner(x)

    def decode(self, code):
        return self.outer(code)

    def double(self, x):
        return 2 * x

    def __call__(self, x):
        return self.plain(self.decode(self.encode(x)))


def test_other_methods_are_traced_themselves():
    """Their rules may name parameters that the method does not read."""
    rules = {"outer": "1:4", "plain": "1:8"}
    sparse = linen.sparsify(Autoencoder(), "2:4", rules=rules)
    variables = sparse.init(KEY, X)
    inner, outer, plain = (
        variables["params"][name]["kernel"] for name in ("inner", "outer", "plain")
    )
    code = sparse.apply(variables, X, method="encode")
    np.testing.assert_array_equal(code, expected(inner))
    decoded = sparse.apply(variables, code, method=Autoencoder.decode)
    one_of_four = jnp.where(nmjax.nm_mask(outer, 1, 4, axis=-1), outer, 0)
    np.testing.assert_array_equal(decoded, code @ one_of_four.T)
    np.testing.assert_array_equal(sparse.apply(variables, X, method="double"), 2 * X)
    one_of_eight = jnp.where(nmjax.nm_mask(plain, 1, 8), plain, 0)
    np.testing.assert_allclose(sparse.apply(variables, X), decoded @ one_of_eight, atol=1e-5)


def test_a_module_that_needs_values_takes_known_layers_only():
    class Branch(nn.Module):
        layer: nn.Module

        @nn.compact
        def __call__(self, x):
            y = self.layer(x)
            return y if y.sum() > 0 else -y

    sparse = linen.sparsify(Branch(nn.Dense(4)), "2:4")
    variables = sparse.init(KEY, X)
    layer = variables["params"]["layer"]
    y = nn.Dense(4).apply({"params": {**layer, "kernel": pruned(layer["kernel"], -2)}}, X)
    np.testing.assert_array_equal(sparse.apply(variables, X), y if y.sum() > 0 else -y)
    # The kernel of this layer has three axes, and no bias that says what they are.
    sparse = linen.sparsify(Branch(nn.DenseGeneral((3, 4), use_bias=False)), "2:4")
    with pytest.raises(ValueError, match="unknown axes"):
        sparse.apply(sparse.init(KEY, X), X)


def test_arguments_that_are_no_arrays():
    class Optional(nn.Module):
        @nn.compact
        def __call__(self, x, sizes, *, then=None, keep=True):
            x = OutIn(sum(sizes))(x)
            return then(x) if keep else x

    sparse = linen.sparsify(Optional(), "2:4")
    variables = sparse.init(KEY, X, (2, 2), then=jnp.tanh)
    kernel = variables["params"]["OutIn_0"]["kernel"]
    result = sparse.apply(variables, X, (2, 2), then=jnp.tanh)
    np.testing.assert_array_equal(result, jnp.tanh(expected(kernel)))


def test_a_forward_pass_of_ones_own_is_refused():
    for given in ({"forward": lambda params, x: x}, {"inputs": (X,)}):
        with pytest.raises(TypeError, match="are not needed here"):
            linen.sparsify(OutIn(4), "2:4", **given)


def test_a_layer_that_another_module_shares():
    """It cannot be traced alone: its shared part takes the axes of a known layer."""

    class Encoder(nn.Module):
        shared: nn.Module

        def setup(self):
            self.own = nn.Dense(8)

        def __call__(self, x):
            return self.own(self.shared(x))

    class Parent(nn.Module):
        sparse: bool

        def setup(self):
            self.shared = nn.Dense(8)
            encoder = Encoder(self.shared)
            self.encoder = linen.sparsify(encoder, "2:4") if self.sparse else encoder

        def __call__(self, x):
            return self.encoder(x)

    variables = Parent(sparse=False).init(KEY, X)
    plan = nmjax.make_plan(variables["params"], "2:4")
    sparse = nmjax.prune(variables["params"], plan)
    np.testing.assert_array_equal(
        Parent(sparse=True).apply(variables, X), Parent(sparse=False).apply({"params": sparse}, X)
    )
