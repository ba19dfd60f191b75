"""Folded normalizations: the module gives what it gave, and its kernels carry the scale."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.linen import fold_batch_norm, make_plan, packed_apply
from tests.nmjax.packed_weights import prune_and_pack

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 16)), jnp.float32)
evaluated = partial(nn.BatchNorm, use_running_average=True)


class Network(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, name="first")(x)
        y = nn.Conv(16, (3, 3), use_bias=False, dtype=self.dtype, name="conv")(x)
        y = nn.BatchNorm(name="norm", dtype=self.dtype)(y, use_running_average=not train)
        y = nn.Conv(16, (3, 3), feature_group_count=4, dtype=self.dtype, name="grouped")(nn.relu(y))
        y = nn.BatchNorm(epsilon=0.1, use_scale=False, name="unscaled")(y, not train)
        y = nn.Dense(16, use_bias=False, name="dense")(nn.relu(x + y))
        return nn.BatchNorm(not train, use_bias=False, name="unshifted")(y)


def dtype_of(leaf):
    return leaf.dtype


def variables_of(module, *inputs):
    """Variables whose normalizations have something to fold."""
    variables = module.init(jax.random.key(0), *inputs)
    numbers = np.random.default_rng(1)

    def change(path, leaf):
        drawn = jnp.asarray(numbers.normal(size=leaf.shape), leaf.dtype)
        name = jax.tree_util.keystr(path)
        return jnp.exp(drawn) if "var" in name else leaf if "kernel" in name else drawn

    return jax.tree_util.tree_map_with_path(change, variables)


# Where dtypes differ, Flax promotes.
MIXED = pytest.param(jnp.bfloat16, marks=pytest.mark.not_under("jax_numpy_dtype_promotion"))


@pytest.mark.parametrize("dtype", [jnp.float32, MIXED])
def test_outputs_stay(dtype):
    network = Network(dtype)
    variables = variables_of(network, X)
    folded = fold_batch_norm(network, variables, X[:1], train=False)
    expected = np.asarray(network.apply(variables, X), np.float32)
    y = np.asarray(network.apply(folded, X), np.float32)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, variables)
    assert jax.tree.map(dtype_of, folded) == jax.tree.map(dtype_of, variables)


def test_the_formula():
    network = Network()
    variables = variables_of(network, X)
    folded = fold_batch_norm(network, variables, X)
    old, new = jax.tree.map(np.asarray, (variables["params"], folded["params"]))
    stats = jax.tree.map(np.asarray, variables["batch_stats"]["norm"])
    factor = old["norm"]["scale"] / np.sqrt(np.float64(stats["var"]) + 1e-5)
    np.testing.assert_allclose(new["conv"]["kernel"], old["conv"]["kernel"] * factor, rtol=1e-5)
    constant = old["norm"]["bias"] - stats["mean"] * factor
    mean, var = (folded["batch_stats"]["norm"][name] for name in ("mean", "var"))
    np.testing.assert_allclose(-mean, constant, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(var + 1e-5, 1, rtol=1e-6)
    assert (new["norm"]["scale"] == 1).all()
    assert (new["norm"]["bias"] == 0).all()
    # What follows no layer stays, and what was given is not changed.
    assert (new["first"]["scale"] == old["first"]["scale"]).all()
    assert (variables["params"]["norm"]["scale"] != 1).any()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(evaluated()(nn.Dense(16)(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        return nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)()(x, None)[
            0
        ]


def test_scanned_layers():
    variables = variables_of(Scanned(), X)
    folded = fold_batch_norm(Scanned(), variables, X)
    expected = Scanned().apply(variables, X)
    np.testing.assert_allclose(Scanned().apply(folded, X), expected, rtol=1e-4, atol=1e-4)


def test_boxed_kernels():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    network = nn.Sequential([nn.Dense(8, kernel_init=boxed), evaluated()])
    variables = variables_of(network, X)
    folded = fold_batch_norm(network, variables, X)
    assert isinstance(folded["params"]["layers_0"]["kernel"], nn.Partitioned)
    y = network.apply(variables, X)
    np.testing.assert_allclose(network.apply(folded, X), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
def test_zeros_stay_and_the_result_can_be_packed(pattern):
    network = Network()
    variables = variables_of(network, X)
    plan = make_plan(network, pattern, X, exclude=["grouped"])
    pruned = {**variables, "params": nmjax.prune(variables["params"], plan)}
    folded = fold_batch_norm(network, pruned, X)
    nmjax.check_sparse(folded["params"], plan)
    packed = {**folded, "params": nmjax.pack(folded["params"], plan)}
    y = jax.jit(packed_apply(network))(packed, X)
    np.testing.assert_allclose(y, network.apply(pruned, X), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_folded():
    class Reused(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(16)(x)
            return y + evaluated()(y)

    network = Network()
    variables = variables_of(network, X)
    for how in ({}, {"mutable": ["batch_stats"]}):
        with pytest.raises(
            ValueError, match=r"first uses the statistics of the batch.*train=False"
        ):
            fold_batch_norm(network, variables, X, train=True, **how)
    rows = nn.Sequential([nn.Dense(16), evaluated(axis=1)])
    with pytest.raises(ValueError, match="layers_1 normalizes axis 1"):
        fold_batch_norm(rows, variables_of(rows, X), X)
    with pytest.raises(ValueError, match="feeds more than its normalization: Dense_0"):
        fold_batch_norm(Reused(), variables_of(Reused(), X), X)
    with pytest.raises(ValueError, match="that follows an"):
        fold_batch_norm(nn.Dense(4), nn.Dense(4).init(jax.random.key(0), X), X)
    with pytest.raises(TypeError, match="linen module"):
        fold_batch_norm(lambda x: x, variables, X)
    packed = prune_and_pack(variables["params"], make_plan(network, "2:4", X))
    with pytest.raises(TypeError, match="call fold_batch_norm before"):
        fold_batch_norm(network, {**variables, "params": packed}, X)
