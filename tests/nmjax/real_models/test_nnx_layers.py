"""Every layer of flax.nnx that holds a kernel, with and without a bias."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.nmjax.real_models.agreement import check, normal, side_by_side


def layers(bias):
    """Name -> (module, input): batches of one, images of one pixel."""
    rngs = nnx.Rngs(0)
    conv = {"in_features": 16, "out_features": 12, "use_bias": bias, "rngs": rngs}
    up = {"kernel_size": (2, 2), "strides": (2, 2), **conv}
    heads = {"num_heads": 4, "in_features": 16, "use_bias": bias, "rngs": rngs, "decode": False}
    return {
        "linear": (nnx.Linear(16, 24, use_bias=bias, rngs=rngs), normal(1, 16)),
        "to_heads": (nnx.LinearGeneral(16, (2, 12), use_bias=bias, rngs=rngs), normal(1, 16)),
        "from_heads": (
            nnx.LinearGeneral((2, 16), 24, axis=(-2, -1), use_bias=bias, rngs=rngs),
            normal(1, 2, 16),
        ),
        "stacked": (
            nnx.LinearGeneral(16, 24, batch_axis={0: 3}, use_bias=bias, rngs=rngs),
            normal(3, 1, 16),
        ),
        "einsum": (
            nnx.Einsum("bi,oi->bo", (24, 16), (24,) if bias else None, rngs=rngs),
            normal(1, 16),
        ),
        "conv_1d": (nnx.Conv(kernel_size=(3,), **conv), normal(1, 1, 16)),
        "conv_2d": (nnx.Conv(kernel_size=(3, 3), **conv), normal(1, 1, 1, 16)),
        "conv_3d": (nnx.Conv(kernel_size=(3, 1, 3), **conv), normal(1, 1, 1, 1, 16)),
        "dilated": (nnx.Conv(kernel_size=(3, 3), kernel_dilation=2, **conv), normal(1, 1, 1, 16)),
        "grouped": (
            nnx.Conv(kernel_size=(3, 3), feature_group_count=2, **conv),
            normal(1, 1, 1, 16),
        ),
        "depthwise": (
            nnx.Conv(12, 12, (3, 3), feature_group_count=12, use_bias=bias, rngs=rngs),
            normal(1, 1, 1, 12),
        ),
        "transposed": (nnx.ConvTranspose(**up), normal(1, 1, 1, 16)),
        "transposed_kernel": (
            nnx.ConvTranspose(transpose_kernel=True, **up),
            normal(1, 1, 1, 16),
        ),
        "attention": (nnx.MultiHeadAttention(**heads), normal(1, 4, 16)),
        "attention_normalized": (
            nnx.MultiHeadAttention(normalize_qk=True, **heads),
            normal(1, 4, 16),
        ),
        "embed": (nnx.Embed(40, 16, rngs=rngs), jnp.array([[33, 37]])),
        "layer_norm": (nnx.LayerNorm(16, use_bias=bias, rngs=rngs), normal(1, 16)),
        "lora": (nnx.LoRALinear(16, 24, lora_rank=4, use_bias=bias, rngs=rngs), normal(1, 16)),
    }


CELLS = {
    "simple": nnx.SimpleCell,
    "lstm": nnx.LSTMCell,
    "fast_lstm": nnx.OptimizedLSTMCell,
    "gru": nnx.GRUCell,
}


def applied(module, x, **arguments):
    graph, params, rest = nnx.split(module, (nnx.Param, nnx.LoRAParam), ...)

    def apply(params, x):
        return nnx.merge(graph, params, rest)(x, **arguments)

    return apply, nnx.to_pure_dict(params), x


@pytest.mark.parametrize("bias", [True, False])
def test_layers(bias):
    made = {name: applied(*layer) for name, layer in layers(bias).items()}
    check(side_by_side(made), adapters=("lora/lora/lora_a", "lora/lora/lora_b"))


def test_recurrent_layers():
    cells = {name: cell(16, 12, rngs=nnx.Rngs(0)) for name, cell in CELLS.items()}
    start = {name: cell.initialize_carry((1, 16), nnx.Rngs(0)) for name, cell in cells.items()}

    def scanned(name, cell):
        return applied(nnx.RNN(cell), normal(1, 2, 16), initial_carry=start[name])

    check(side_by_side({name: scanned(name, cell) for name, cell in cells.items()}))


def test_layers_stacked_by_vmap_and_scan():
    @nnx.vmap(in_axes=0, out_axes=1)
    def make(rngs):
        return nnx.Linear(16, 16, rngs=rngs)

    layers = make(nnx.Rngs(0).split(2))

    @nnx.scan(in_axes=(nnx.Carry, 1), out_axes=nnx.Carry)
    def run(x, layer):
        return jnp.tanh(layer(x))

    graph, params = nnx.split(layers)
    layer = (lambda params, x: run(x, nnx.merge(graph, params))), nnx.to_pure_dict(params)
    check(side_by_side({"layers": (*layer, normal(1, 16))}))
    assert jax.tree.map(jnp.shape, layer[1])["kernel"] == (16, 2, 16)
