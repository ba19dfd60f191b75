"""Layouts of Haiku's layers, judged by what the layers compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.layouts import Unknown, layouts
from tests.nmjax.oracle import connections, disagreement

hk = pytest.importorskip("haiku")

# Layer, its input, positions, groups, and where the axes are certain: with a bias ("b"), without
# one ("-"), and both in a layer with the name that Haiku gives it ("B", "_").
LAYERS = {
    "Linear": (hk.Linear, (5,), {}, (6,), (), 1, "b-B_"),
    "Conv1D": (hk.Conv1D, (5, 3), {}, (3, 4), (0,), 1, "B_"),
    "Conv2D": (hk.Conv2D, (5, (3, 2)), {}, (3, 2, 4), (0, 1), 1, "bB_"),
    "square": (hk.Conv2D, (4, (3, 2)), {}, (3, 2, 4), (0, 1), 1, "B_"),
    "channels first": (
        hk.Conv2D,
        (5, (3, 2)),
        {"data_format": "NCHW"},
        (4, 3, 2),
        (1, 2),
        1,
        "bB_",
    ),
    "groups": (hk.Conv2D, (6, (3, 2)), {"feature_group_count": 2}, (3, 2, 4), (0, 1), 2, "bB_"),
    "Conv1DTranspose": (hk.Conv1DTranspose, (5, 3), {}, (1, 4), (0,), 1, "bB"),
    "Conv2DTranspose": (hk.Conv2DTranspose, (5, (3, 2)), {}, (1, 1, 4), (0, 1), 1, "bB"),
    "square, transposed": (hk.Conv2DTranspose, (4, (3, 2)), {}, (1, 1, 4), (0, 1), 1, ""),
    "channels first, transposed": (
        hk.Conv2DTranspose,
        (5, (3, 2)),
        {"data_format": "NCHW"},
        (4, 1, 1),
        (1, 2),
        1,
        "bB",
    ),
    "DepthwiseConv2D": (hk.DepthwiseConv2D, (2, (3, 2)), {}, (3, 2, 4), (0, 1), 4, "bB_"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind):
    cls, sizes, options, x_shape, positions, groups, certain = LAYERS[kind]
    if cls is not hk.Linear:
        options = {**options, "padding": "VALID"}
    model = hk.without_apply_rng(hk.transform(lambda x: cls(*sizes, **options)(x[None])[0]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=x_shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    ((name, layer),) = params.items()
    bias = jnp.zeros(layer["b"].shape)
    weight = jax.random.normal(jax.random.key(1), layer["w"].shape)
    met = connections(
        lambda w, x: model.apply({name: {"w": w, "b": bias}}, x), weight, x, positions
    )
    for letter, parent, with_bias in (
        ("b", "layer", True),
        ("-", "layer", False),
        ("B", name, True),
        ("_", name, False),
    ):
        shapes = {f"{parent}/w": weight.shape} | ({f"{parent}/b": bias.shape} if with_bias else {})
        found = layouts(shapes)[f"{parent}/w"]
        assert disagreement(found, met, groups=groups, taps=6) == ""
        assert (letter in certain) == (not isinstance(found, Unknown)), (letter, found)
