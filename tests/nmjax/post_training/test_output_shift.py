"""What pruning does to mean outputs, against the outputs themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nmjax
from nmjax.post_training import output_shift

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def conv(x, w, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


# The product of a weight, its shape, and that of the input; inputs have a mean.
LAYERS = {
    "matrix": (lambda x, w: x @ w, (8, 6), (5, 8)),
    "torch's order": (lambda x, w: x @ w.T, (6, 8), (5, 8)),
    "heads": (lambda x, w: jnp.einsum("bte,ehd->bthd", x, w), (8, 2, 3), (5, 4, 8)),
    "convolution": (conv, (3, 3, 4, 6), (2, 5, 5, 4)),
    "groups": (lambda x, w: conv(x, w, 2), (1, 1, 4, 6), (2, 5, 5, 8)),
    "experts": (lambda x, w: jnp.einsum("nbi,nio->nbo", x, w), (3, 8, 6), (3, 5, 8)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_bias_restores_the_mean_output(layer):
    product, shape, inputs = LAYERS[layer]
    params, batches = {"w": normal(*shape)}, [normal(*inputs) + 1 for _ in range(2)]

    def forward(params, x):
        return product(x, params["w"])

    plan = nmjax.make_plan(params, "2:4", forward=forward, inputs=(batches[0],))
    pruned = nmjax.prune(params, plan)
    found = output_shift(forward, params, pruned, batches, plan)["w"]
    change = [forward(params, x) - forward(pruned, x) for x in batches]
    # The mean over everything but outputs, and but the experts.
    kept = {"heads": (2, 3), "experts": (0, 2)}.get(layer, (-1,))
    axes = tuple(i for i in range(change[0].ndim) if i not in [k % change[0].ndim for k in kept])
    expected = np.mean([np.mean(x, axis=axes) for x in change], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_layers_of_a_scan_have_a_shift_each():
    params, batches = {"w": normal(3, 8, 8)}, [normal(5, 8)]

    def forward(params, x):
        return lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, params["w"])[0]

    plan = nmjax.make_plan(params, "2:4", forward=forward, inputs=(batches[0],))
    pruned = nmjax.prune(params, plan)
    found = output_shift(forward, params, pruned, batches, plan)["w"]
    x, expected = batches[0], []
    for w, v in zip(params["w"], pruned["w"], strict=True):
        expected.append((x @ (w - v)).mean(0))
        x = jax.nn.relu(x @ w)
    np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-4, atol=1e-5)


def test_trees_that_do_not_fit_are_refused():
    params, x = {"w": normal(8, 6)}, normal(5, 8)

    def forward(params, x):
        return x @ params["w"]

    plan = nmjax.make_plan(params, "2:4", forward=forward, inputs=(x,))
    with pytest.raises(ValueError, match="w"):
        output_shift(forward, params, {"v": params["w"]}, [x], plan)
    with pytest.raises(ValueError, match="no batches"):
        output_shift(forward, params, params, [], plan)
