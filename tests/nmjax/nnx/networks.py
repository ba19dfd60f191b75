"""Networks for the tests of nmjax.nnx."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Network(nnx.Module):
    """Layers in a list, batch normalization and dropout."""

    def __init__(self, rngs, width=16):
        self.layers = nnx.List([nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, width, rngs=rngs)])
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(self.dropout(self.norm(x)))


class Call(nnx.Module):
    """A layer that is not called with one array, as a module that is."""

    def __init__(self, layer, call):
        self.layer, self.call = layer, call

    def __call__(self, *inputs):
        return self.call(self.layer, *inputs)


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=0, out_axes=0)
def stack_of_layers(rngs):
    """Three layers, with a leading axis in front of each variable."""
    return nnx.Linear(16, 16, rngs=rngs)


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def scanned(layer, x):
    return nnx.tanh(layer(x))


@nnx.vmap(in_axes=(0, 0), out_axes=0)
def mapped(layer, x):
    return layer(x)


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_same(a, b, **tolerance):
    """Two states have the same structure and, within a tolerance, the same values."""

    def check(x, y):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(check, a, b)
