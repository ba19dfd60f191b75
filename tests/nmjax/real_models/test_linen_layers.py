"""Every layer of flax.linen that holds a kernel, with and without a bias."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from nmjax.layouts import Axes
from nmjax.tracing.program import read_program
from tests.nmjax.real_models.agreement import check, from_shapes, normal, side_by_side

KEY = jax.random.key(0)


def layers(bias):
    """Name -> (module, input): batches of one, images of one pixel."""
    conv = {"features": 12, "use_bias": bias}
    heads = {"num_heads": 4, "use_bias": bias}
    patch = jnp.zeros((1, 4, 4, 16)).at[0, 1, 2].set(normal(16))
    return {
        "dense": (nn.Dense(24, use_bias=bias), normal(1, 16)),
        "stacked": (nn.DenseGeneral(24, batch_dims=(0,), use_bias=bias), normal(3, 1, 16)),
        "to_heads": (nn.DenseGeneral((2, 12), use_bias=bias), normal(1, 16)),
        "from_heads": (nn.DenseGeneral(24, axis=(-2, -1), use_bias=bias), normal(1, 2, 16)),
        "fused_qkv": (nn.DenseGeneral((3, 2, 6), use_bias=bias), normal(1, 2, 16)),
        "query": (nn.DenseGeneral((2, 12), use_bias=bias), normal(1, 16)),
        "einsum": (nn.Einsum((24, 16), "bi,oi->bo", use_bias=bias), normal(1, 16)),
        "einsum_heads": (nn.Einsum((2, 16, 12), "bi,hid->bhd", use_bias=bias), normal(1, 16)),
        "conv_1d": (nn.Conv(kernel_size=(3,), **conv), normal(1, 1, 16)),
        "conv_2d": (nn.Conv(kernel_size=(3, 3), **conv), normal(1, 1, 1, 16)),
        "conv_3d": (nn.Conv(kernel_size=(3, 1, 3), **conv), normal(1, 1, 1, 1, 16)),
        "dilated": (nn.Conv(kernel_size=(3, 3), kernel_dilation=2, **conv), normal(1, 1, 1, 16)),
        "grouped": (
            nn.Conv(kernel_size=(3, 3), feature_group_count=2, **conv),
            normal(1, 1, 1, 16),
        ),
        "depthwise": (
            nn.Conv(12, (3, 3), feature_group_count=12, use_bias=bias),
            normal(1, 1, 1, 12),
        ),
        "circular": (nn.Conv(kernel_size=(3,), padding="CIRCULAR", **conv), normal(1, 4, 16)),
        "causal": (nn.Conv(kernel_size=(3,), padding="CAUSAL", **conv), normal(1, 1, 16)),
        "patches": (nn.Conv(kernel_size=(4, 4), strides=4, padding="VALID", **conv), patch),
        "local": (nn.ConvLocal(kernel_size=(3,), **conv), normal(1, 1, 16)),
        "transposed": (
            nn.ConvTranspose(kernel_size=(2, 2), strides=(2, 2), **conv),
            normal(1, 1, 1, 16),
        ),
        "transposed_kernel": (
            nn.ConvTranspose(kernel_size=(2, 2), strides=(2, 2), transpose_kernel=True, **conv),
            normal(1, 1, 1, 16),
        ),
        "attention": (nn.MultiHeadDotProductAttention(**heads), normal(1, 4, 16)),
        "attention_normalized": (
            nn.MultiHeadDotProductAttention(normalize_qk=True, **heads),
            normal(1, 4, 16),
        ),
        "conv_lstm": (nn.RNN(nn.ConvLSTMCell(12, (3, 3), use_bias=bias)), normal(1, 2, 1, 1, 16)),
        "embed": (nn.Embed(40, 16), jnp.array([[33, 37]])),
        "layer_norm": (nn.LayerNorm(use_bias=bias), normal(1, 16)),
        "group_norm": (nn.GroupNorm(2, use_bias=bias), normal(1, 16)),
        "low_rank": (LowRank(bias), normal(1, 16)),
    }


CELLS = {
    "simple": nn.SimpleCell,
    "lstm": nn.LSTMCell,
    "fast_lstm": nn.OptimizedLSTMCell,
    "gru": nn.GRUCell,
    "mgu": nn.MGUCell,
}


class LowRank(nn.Module):
    """A frozen kernel with a product of two narrow ones beside it (LoRA)."""

    use_bias: bool

    @nn.compact
    def __call__(self, x):
        shapes = {"lora_a": (16, 4), "lora_b": (4, 24)}
        a, b = (self.param(name, nn.initializers.normal(), shapes[name]) for name in shapes)
        return nn.Dense(24, use_bias=self.use_bias)(x) + 2.0 * (x @ a @ b)


def applied(module, x):
    params = from_shapes(jax.eval_shape(module.init, KEY, x))["params"]
    return (lambda params, x: module.apply({"params": params}, x)), params, x


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_layers(bias):
    made = {name: applied(*layer) for name, layer in layers(bias).items()}
    check(side_by_side(made), adapters=("low_rank/lora_a", "low_rank/lora_b"))


@pytest.mark.slow
def test_recurrent_layers():
    check(
        side_by_side(
            {name: applied(nn.RNN(cell(12)), normal(1, 2, 16)) for name, cell in CELLS.items()}
        )
    )


def test_weight_norm_keeps_the_zeros_of_its_kernel():
    """The oracle sees no product, since each weight of a column scales all of them."""
    layer = nn.WeightNorm(nn.Dense(24, use_bias=False))
    apply, params, x = applied(layer, normal(1, 16))
    uses = read_program(apply, params, x).uses
    assert uses["layer_instance/kernel"].axes() == Axes((-2,), (-1,))
