"""Every layer of Equinox that holds a weight, with and without a bias."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from tests.nmjax.real_models.agreement import check, normal, side_by_side

KEY = jax.random.key(0)


def layers(bias):
    """Name -> (module, input): images of one pixel."""
    conv = {"in_channels": 16, "out_channels": 12, "use_bias": bias, "key": KEY}
    same = {"kernel_size": 3, "padding": 1, **conv}
    up = {"kernel_size": 2, "stride": 2, **conv}
    return {
        "linear": (eqx.nn.Linear(16, 24, use_bias=bias, key=KEY), (16,)),
        "to_scalar": (eqx.nn.Linear(16, "scalar", use_bias=bias, key=KEY), (16,)),
        "mlp": (eqx.nn.MLP(16, 12, 24, 2, use_bias=bias, use_final_bias=bias, key=KEY), (16,)),
        "conv_1d": (eqx.nn.Conv1d(**same), (16, 1)),
        "conv_2d": (eqx.nn.Conv2d(**same), (16, 1, 1)),
        "conv_3d": (eqx.nn.Conv3d(**same), (16, 1, 1, 1)),
        "dilated": (eqx.nn.Conv2d(**{**same, "dilation": 2, "padding": 2}), (16, 1, 1)),
        "grouped": (eqx.nn.Conv2d(groups=2, **same), (16, 1, 1)),
        "depthwise": (
            eqx.nn.Conv2d(12, 12, 3, padding=1, groups=12, use_bias=bias, key=KEY),
            (12, 1, 1),
        ),
        "transposed_1d": (eqx.nn.ConvTranspose1d(**up), (16, 1)),
        "transposed_2d": (eqx.nn.ConvTranspose2d(**up), (16, 1, 1)),
        "lstm": (Scanned(eqx.nn.LSTMCell(16, 12, use_bias=bias, key=KEY)), (2, 16)),
        "gru": (Scanned(eqx.nn.GRUCell(16, 12, use_bias=bias, key=KEY)), (2, 16)),
        "attention": (
            SelfAttention(
                eqx.nn.MultiheadAttention(
                    4,
                    16,
                    use_query_bias=bias,
                    use_key_bias=bias,
                    use_value_bias=bias,
                    use_output_bias=bias,
                    key=KEY,
                )
            ),
            (4, 16),
        ),
        "layer_norm": (eqx.nn.LayerNorm(16, use_bias=bias), (16,)),
    }


class Scanned(eqx.Module):
    """A recurrent cell over two steps; the LSTM's state is a pair."""

    cell: eqx.Module

    def __call__(self, xs):
        zeros = jnp.zeros(12)
        start = zeros if isinstance(self.cell, eqx.nn.GRUCell) else (zeros, zeros)
        last, _ = jax.lax.scan(lambda state, x: (self.cell(x, state), None), start, xs)
        return last


class SelfAttention(eqx.Module):
    """Attention over its own input."""

    attention: eqx.nn.MultiheadAttention

    def __call__(self, x):
        return self.attention(x, x, x, mask=jnp.tri(len(x), dtype=bool))


def applied(module, x):
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return (lambda params, x: eqx.combine(params, static)(x)), params, x


def without_compiling(make):
    """What `make` returns, with zeros for its arrays: random numbers take long to compile."""
    abstract = eqx.filter_eval_shape(make)
    return jax.tree.map(
        lambda leaf: (
            jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
        ),
        abstract,
    )


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_layers(bias):
    made = without_compiling(lambda: layers(bias))
    check(side_by_side({name: applied(m, normal(*shape)) for name, (m, shape) in made.items()}))


def test_embeddings():
    check(side_by_side({"embed": applied(eqx.nn.Embedding(40, 16, key=KEY), jnp.array(33))}))


def test_layers_stacked_by_vmap():
    """A stack of layers, and a scan over it."""
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(16, 16, key=key))(jax.random.split(KEY, 2))
    params, static = eqx.partition(stack, eqx.is_inexact_array)

    def run(params, x):
        layers = params
        return jax.lax.scan(
            lambda x, layer: (jnp.tanh(eqx.combine(layer, static)(x)), None), x, layers
        )[0]

    check(side_by_side({"layers": (run, params, normal(16))}))
