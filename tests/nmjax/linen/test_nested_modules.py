"""Sparse linen modules inside other modules, and inside and around Flax's transformations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax import linen

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 8))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def explicit(module, plan, lambda_w=None):
    """`module.apply` on sparse parameters, made the explicit way."""

    def apply(variables, *args, **kwargs):
        params = nmjax.sparsify(variables["params"], plan, lambda_w=lambda_w)
        return module.apply({**variables, "params": params}, *args, **kwargs)

    return apply


class Parent(nn.Module):
    """A part made in setup, sparse or not."""

    sparse: bool

    def setup(self):
        part = nn.Sequential([nn.Dense(16), nn.Dropout(0.5, deterministic=False), nn.Dense(8)])
        self.part = linen.sparsify(part, "2:4") if self.sparse else part
        self.head = nn.Dense(3)

    def __call__(self, x):
        return self.head(self.part(self.part(x)))  # Shared, and new random numbers each time.


def test_a_part_made_in_setup_keeps_names_values_and_random_numbers():
    dense, sparse = Parent(sparse=False), Parent(sparse=True)
    variables = dense.init(KEY, X)
    assert_same(sparse.init(KEY, X), variables)
    plan = nmjax.make_plan(variables["params"], "2:4", include="^part")
    rngs = {"dropout": jax.random.key(3)}
    result = sparse.apply(variables, X, rngs=rngs)
    assert_same(result, explicit(dense, plan)(variables, X, rngs=rngs))
    assert (result != dense.apply(variables, X, rngs=rngs)).any()


def test_a_part_made_in_a_compact_method():
    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = linen.sparsify(nn.Dense(8), "2:4")(x)
            return linen.sparsify(nn.Dense(4, name="head", parent=None), "2:4")(x)

    variables = Compact().init(KEY, X)
    assert variables["params"].keys() == {"SparseDense_0", "head"}
    sparse = nmjax.prune(variables["params"], nmjax.make_plan(variables["params"], "2:4"))
    expected = nn.Dense(4).apply(
        {"params": sparse["head"]}, nn.Dense(8).apply({"params": sparse["SparseDense_0"]}, X)
    )
    assert_same(Compact().apply(variables, X), expected)


def test_parts_that_belong_to_another_module_are_refused():
    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.sparsify(nn.Sequential([nn.Dense(8), nn.Dense(4)]), "2:4")(x)

    with pytest.raises(ValueError, match="create them in setup, or with parent=None"):
        Compact().apply(Compact().init(KEY, X), X)


def test_a_sparse_module_as_a_field():
    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="head")(self.inner(x))

    dense = Outer(nn.Dense(8))
    sparse = Outer(linen.sparsify(nn.Dense(8), "2:4"))
    variables = dense.init(KEY, X)
    assert_same(sparse.init(KEY, X), variables)
    plan = nmjax.make_plan(variables["params"], "2:4", include="inner")
    assert_same(sparse.apply(variables, X), explicit(dense, plan)(variables, X))


# Transformations, inside and around


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dropout(0.5, deterministic=False)(nn.tanh(nn.Dense(8)(x))), None


def scanned(target, **kwargs):
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True, "dropout": True}}
    return nn.scan(target, length=3, **axes, **kwargs)


@pytest.mark.parametrize("layer", [Layer, nn.remat(Layer)], ids=["scan", "scan of remat"])
def test_scan_and_remat_inside(layer):
    dense = scanned(layer)()
    sparse = linen.sparsify(dense, "2:4")
    rngs = {"params": KEY, "dropout": KEY}
    variables = dense.init(rngs, X, None)
    assert_same(sparse.init(rngs, X, None), variables)
    plan = nmjax.make_plan(variables["params"], "2:4")

    def loss(params, apply):
        return (apply({"params": params}, X, None, rngs=rngs)[0] ** 2).sum()

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = gradient(variables["params"], explicit(dense, plan))
    assert_same(gradient(variables["params"], sparse.apply), expected)


def scan_function(layer_class):
    return scanned(lambda module, x, _: module(x))(layer_class(name="layer"), X, None)


def scan_class(layer_class):
    return scanned(layer_class)(name="layer")(X, None)


def remat_function(layer_class):
    return nn.remat(lambda module, x: module(x))(layer_class(name="layer"), X)


def remat_class(layer_class):
    return nn.remat(layer_class)(name="layer")(X)


@pytest.mark.parametrize("around", [scan_function, scan_class, remat_function, remat_class])
def test_scan_and_remat_around(around):
    class Stack(nn.Module):
        layer_class: type[nn.Module]

        @nn.compact
        def __call__(self):
            return around(self.layer_class)[0]

    dense, sparse = Stack(Layer), Stack(type(linen.sparsify(Layer(), "2:4")))
    rngs = {"params": KEY, "dropout": KEY}
    variables = dense.init(rngs)
    assert_same(sparse.init(rngs), variables)
    plan = nmjax.make_plan(variables["params"], "2:4")
    result = sparse.apply(variables, rngs=rngs)
    np.testing.assert_allclose(result, explicit(dense, plan)(variables, rngs=rngs), rtol=1e-6)
    assert (result != dense.apply(variables, rngs=rngs)).any()


def test_linen_vmap_of_a_sparse_module():
    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            member = linen.sparsify(nn.Dense(4, name="member", parent=None), "2:4")
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            return nn.vmap(lambda m, x: m(x), in_axes=None, axis_size=3, **axes)(member, x)

    variables = Ensemble().init(KEY, X)
    kernel = variables["params"]["member"]["kernel"]
    assert kernel.shape == (3, 8, 4)
    pruned = jnp.where(nmjax.nm_mask(kernel, 2, 4), kernel, 0)
    expected = jnp.einsum("bi,eio->ebo", X, pruned)
    np.testing.assert_allclose(Ensemble().apply(variables, X), expected, atol=1e-5)


def test_recurrent_cells_inside_and_outside_of_rnn():
    sequence = jax.random.normal(KEY, (2, 5, 8), jnp.float32)
    dense = nn.RNN(nn.LSTMCell(16))
    variables = dense.init(KEY, sequence)
    plan = nmjax.make_plan(variables["params"], "2:4")
    expected = explicit(dense, plan)(variables, sequence)
    for sparse in (
        linen.sparsify(dense, "2:4"),
        nn.RNN(linen.sparsify(nn.LSTMCell(16), "2:4")),
    ):
        assert_same(sparse.init(KEY, sequence), variables)
        np.testing.assert_allclose(sparse.apply(variables, sequence), expected, atol=1e-6)
    cell = linen.sparsify(nn.LSTMCell(16), "2:4")
    assert_same(cell.initialize_carry(KEY, (2, 8)), nn.LSTMCell(16).initialize_carry(KEY, (2, 8)))


def test_boxed_parameters_stay_boxed():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    dense = nn.Dense(4, kernel_init=init)
    sparse = linen.sparsify(dense, "2:4")
    variables = sparse.init(KEY, X)
    assert_same(variables, dense.init(KEY, X))
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    result = sparse.apply(variables, X)
    assert_same(result, sparse.apply(nn.unbox(variables), X))
    gradient = jax.grad(lambda v: sparse.apply(v, X).sum())(variables)
    assert jax.tree.structure(gradient) == jax.tree.structure(variables)


def test_attention():
    dense = nn.MultiHeadDotProductAttention(2, qkv_features=16, out_features=8)
    sparse = linen.sparsify(dense, "2:4")
    variables = dense.init(KEY, X[None])
    plan = nmjax.make_plan(variables["params"], "2:4")
    assert plan["out/kernel"].reduction_axes == (-3, -2)
    assert_same(sparse.apply(variables, X[None]), explicit(dense, plan)(variables, X[None]))
