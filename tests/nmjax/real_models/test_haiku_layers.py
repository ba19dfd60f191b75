"""Every layer of Haiku that holds a weight, with and without a bias."""

import jax
import jax.numpy as jnp
import pytest

from tests.nmjax.real_models.agreement import check, from_shapes, normal, side_by_side

hk = pytest.importorskip("haiku")
pytestmark = pytest.mark.slow

KEY = jax.random.key(0)


def layers(bias):
    """Name -> (constructor, input): batches of one, images of one pixel."""
    conv = {"output_channels": 12, "with_bias": bias}
    return {
        "linear": (lambda: hk.Linear(24, with_bias=bias), normal(1, 16)),
        "conv_1d": (lambda: hk.Conv1D(kernel_shape=3, **conv), normal(1, 1, 16)),
        "conv_2d": (lambda: hk.Conv2D(kernel_shape=3, **conv), normal(1, 1, 1, 16)),
        "conv_3d": (lambda: hk.Conv3D(kernel_shape=3, **conv), normal(1, 1, 1, 1, 16)),
        "dilated": (lambda: hk.Conv2D(kernel_shape=3, rate=2, **conv), normal(1, 1, 1, 16)),
        "grouped": (
            lambda: hk.Conv2D(kernel_shape=3, feature_group_count=2, **conv),
            normal(1, 1, 1, 16),
        ),
        "depthwise": (
            lambda: hk.DepthwiseConv2D(1, kernel_shape=3, with_bias=bias),
            normal(1, 1, 1, 12),
        ),
        "separable": (
            lambda: hk.SeparableDepthwiseConv2D(1, kernel_shape=3, with_bias=bias),
            normal(1, 1, 1, 12),
        ),
        "transposed_1d": (
            lambda: hk.Conv1DTranspose(kernel_shape=2, stride=2, **conv),
            normal(1, 1, 16),
        ),
        "transposed_2d": (
            lambda: hk.Conv2DTranspose(kernel_shape=2, stride=2, **conv),
            normal(1, 1, 1, 16),
        ),
        "mlp": (lambda: hk.nets.MLP([24, 12], with_bias=bias), normal(1, 16)),
        "attention": (
            lambda: SelfAttention(
                4, 4, model_size=16, with_bias=bias, w_init=hk.initializers.RandomNormal()
            ),
            normal(1, 4, 16),
        ),
        "lstm": (lambda: scanned(hk.LSTM(12)), normal(2, 1, 16)),
        "gru": (lambda: scanned(hk.GRU(12)), normal(2, 1, 16)),
        "vanilla": (lambda: scanned(hk.VanillaRNN(12)), normal(2, 1, 16)),
        "conv_lstm": (lambda: scanned(hk.Conv1DLSTM((1,), 12, 3)), normal(2, 1, 1, 16)),
        "embed": (lambda: hk.Embed(40, 16), jnp.array([[33, 37]])),
        "layer_norm": (lambda: hk.LayerNorm(-1, True, bias), normal(1, 16)),
    }


class SelfAttention(hk.MultiHeadAttention):
    """Attention over its own input."""

    def __call__(self, x):
        return super().__call__(x, x, x)


def scanned(core):
    """A recurrent core over the first axis of its input."""
    return lambda xs: hk.dynamic_unroll(core, xs, core.initial_state(xs.shape[1]))[0]


def applied(make, x):
    network = hk.without_apply_rng(hk.transform(lambda x: make()(x)))
    return network.apply, from_shapes(jax.eval_shape(network.init, KEY, x)), x


@pytest.mark.parametrize("bias", [True, False])
def test_layers(bias):
    check(side_by_side({name: applied(*layer) for name, layer in layers(bias).items()}))


def test_layers_stacked_by_layer_stack():
    def network(x):
        return hk.experimental.layer_stack(2)(lambda x: jnp.tanh(hk.Linear(16)(x)))(x)

    check(side_by_side({"layers": applied(lambda: network, normal(1, 16))}))
