"""Keras layers and models on JAX; Keras reads its back end when it is imported."""

import os

import jax
import jax.numpy as jnp
import pytest

from tests.nmjax.real_models.agreement import Model, check, normal
from tests.nmjax.real_models.oracle import randomized

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def keras():
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = "jax"
    module = pytest.importorskip("keras")
    with pytest.MonkeyPatch.context() as patch:
        # Random numbers take ten times as long to compile as the test; `randomized` adds others.
        patch.setattr(jax.random, "uniform", lambda _, shape, dtype, **__: jnp.zeros(shape, dtype))
        yield module
    os.environ.pop("KERAS_BACKEND") if before is None else os.environ.update(KERAS_BACKEND=before)


def model_of(keras, module, *inputs):
    """The model of a Keras layer or model; its variables are named by their paths."""
    module(*(keras.KerasTensor(x.shape, str(x.dtype)) for x in inputs))
    paths = [variable.path for variable in module.trainable_variables]
    params = {path: v.value for path, v in zip(paths, module.trainable_variables, strict=True)}
    others = [v.value for v in module.non_trainable_variables]

    def forward(params, *inputs):
        values = [params[path] for path in paths]
        return module.stateless_call(values, others, *inputs)[0]

    return Model(forward, randomized(params), inputs)


def test_layers(keras):
    layers = keras.layers
    made = {
        "dense": (layers.Dense(24), normal(1, 16)),
        "without_bias": (layers.Dense(24, use_bias=False), normal(1, 16)),
        "einsum": (layers.EinsumDense("abc,cde->abde", (None, 4, 6), None, "de"), normal(1, 2, 16)),
        "from_heads": (layers.EinsumDense("abcd,cde->abe", (None, 24)), normal(1, 2, 4, 4)),
        "conv_1d": (layers.Conv1D(12, 3, padding="same"), normal(1, 1, 16)),
        "conv_2d": (layers.Conv2D(12, 3, padding="same"), normal(1, 1, 1, 16)),
        "conv_3d": (layers.Conv3D(12, 3, padding="same"), normal(1, 1, 1, 1, 16)),
        "grouped": (layers.Conv2D(12, 3, padding="same", groups=2), normal(1, 1, 1, 16)),
        "transposed_1d": (layers.Conv1DTranspose(12, 2, strides=2), normal(1, 1, 16)),
        "transposed_2d": (layers.Conv2DTranspose(12, 2, strides=2), normal(1, 1, 1, 16)),
        "square_transposed": (layers.Conv2DTranspose(16, 2, strides=2), normal(1, 1, 1, 16)),
        "depthwise": (layers.DepthwiseConv2D(3, padding="same"), normal(1, 1, 1, 12)),
        "separable": (layers.SeparableConv2D(12, 3, padding="same"), normal(1, 1, 1, 16)),
        "lstm": (layers.LSTM(12), normal(1, 2, 16)),
        "gru": (layers.GRU(12), normal(1, 2, 16)),
        "rnn": (layers.SimpleRNN(12), normal(1, 2, 16)),
        "embedding": (layers.Embedding(40, 16), jnp.array([[33, 37]])),
        "norm": (layers.LayerNormalization(), normal(1, 16)),
    }
    singles = {name: model_of(keras, *layer) for name, layer in made.items()}

    def forward(params, inputs):
        return {name: one.forward(params[name], inputs[name]) for name, one in singles.items()}

    params = {name: one.params for name, one in singles.items()}
    check(Model(forward, params, ({name: one.inputs[0] for name, one in singles.items()},)))


def test_transformer(keras):
    layers = keras.layers
    tokens = keras.Input((4,), dtype="int32")
    x = layers.Embedding(40, 16)(tokens)
    x = layers.Add()([x, layers.MultiHeadAttention(4, 4)(x, x, use_causal_mask=True)])
    x = layers.Add()([x, layers.GroupQueryAttention(4, 4, 2)(x, x, use_causal_mask=True)])
    x = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.Dense(16)(layers.Dense(24, "gelu")(x))])
    model = keras.Model(tokens, layers.Dense(40)(x))
    check(model_of(keras, model, jnp.array([[33, 36, 37, 39]])))
