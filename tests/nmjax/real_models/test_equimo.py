"""equimo's vision models, made of Equinox layers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from tests.nmjax.real_models.agreement import Model, check, normal
from tests.nmjax.real_models.oracle import randomized

models = pytest.importorskip("equimo.models")
pytestmark = pytest.mark.slow

KEY = jax.random.key(0)


def model_of(module, image):
    """The model of a module in inference mode; its output and its features are both read."""
    params, static = eqx.partition(eqx.nn.inference_mode(module), eqx.is_inexact_array)

    def forward(params, image):
        module = eqx.combine(params, static)
        return module(image, KEY, inference=True), module.features(image, KEY, inference=True)

    return Model(forward, randomized(params), (image,))


def one_pixel(size):
    """An image with one pixel that is not black: a patch reaches one tap."""
    return jnp.zeros((3, size, size)).at[:, 5, 6].set(normal(3))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_vision_transformer(ffn, bias):
    module = models.VisionTransformer(
        img_size=8,
        in_channels=3,
        dim=16,
        patch_size=4,
        num_heads=4,
        depths=[2],
        num_classes=10,
        reg_tokens=1,
        qkv_bias=bias,
        proj_bias=bias,
        ffn_layer=ffn,
        init_values=0.5,
        key=KEY,
    )
    check(model_of(module, one_pixel(8)))
