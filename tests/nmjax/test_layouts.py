"""Axes, judged by what the layers of real libraries compute.

What a layer sums over is not read off its kernel here: it is the Jacobian of its output with
respect to its input, a matrix (out, in), in which every group of m inputs must have n weights.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nmjax
from nmjax.trees.leaves import named_leaves

KEY = jax.random.key(0)
PATTERNS = ["2:4", "1:8"]


def matrix(layer, x):
    """The (out, in) matrix by which a linear layer multiplies, taken from the layer itself."""
    jacobian = jax.jit(jax.jacobian(lambda flat: layer(flat.reshape(x.shape)).ravel()))(x.ravel())
    return np.asarray(jacobian)


def assert_groups(weights, pattern):
    """Of every m consecutive inputs of every output exactly n have a weight."""
    n, m = map(int, pattern.split(":"))
    assert weights.ndim == 2
    assert weights.shape[1] % m == 0
    kept = (weights.reshape(weights.shape[0], -1, m) != 0).sum(axis=-1)
    np.testing.assert_array_equal(kept, n)


def pruned(params, pattern, **selection):
    return nmjax.prune(params, nmjax.make_plan(params, pattern, **selection))


def taps(jacobian, spatial, inputs):
    """Splits a convolution's (one pixel's outputs, in) matrix by tap; drops taps out of reach."""
    matrices = jacobian.reshape(jacobian.shape[0], *spatial, inputs).reshape(
        jacobian.shape[0], -1, inputs
    )
    return [tap for tap in matrices.transpose(1, 0, 2) if tap.any()]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_linen_dense(pattern):
    x = jnp.ones(16)
    params = jax.jit(nn.Dense(6).init)(KEY, x)["params"]
    sparse = pruned(params, pattern)
    assert_groups(matrix(lambda x: nn.Dense(6).apply({"params": sparse}, x), x), pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_linen_conv_groups_input_channels_at_each_tap(pattern):
    x = jnp.ones((3, 3, 16))
    conv = nn.Conv(6, (3, 3), padding="VALID")  # One output pixel.
    sparse = pruned(jax.jit(conv.init)(KEY, x)["params"], pattern)
    jacobian = matrix(lambda x: conv.apply({"params": sparse}, x), x)
    by_tap = taps(jacobian, (3, 3), 16)
    assert len(by_tap) == 9
    for tap in by_tap:
        assert_groups(tap, pattern)


def test_linen_conv_1d_and_grouped():
    x = jnp.ones((3, 16))
    conv = nn.Conv(8, (3,), padding="VALID", feature_group_count=2)
    params = jax.jit(conv.init)(KEY, x)["params"]
    assert params["kernel"].shape == (3, 8, 8)
    # By its shape alone, it could also be the output projection of attention.
    sparse = pruned({"Conv_0": params}, "2:4")["Conv_0"]
    for tap in taps(matrix(lambda x: conv.apply({"params": sparse}, x), x), (3,), 16):
        # The first half of the outputs reads the first half of the inputs.
        assert_groups(tap[:4, :8], "2:4")
        assert_groups(tap[4:, 8:], "2:4")
        assert not tap[:4, 8:].any()


@pytest.mark.parametrize("inputs", [(16,), (4, 8)])
@pytest.mark.parametrize("outputs", [(2, 8), (3, 2, 5)])
def test_linen_dense_general_with_several_output_axes(inputs, outputs):
    axes = tuple(range(-len(inputs), 0))
    layer = nn.DenseGeneral(outputs, axis=axes)
    x = jax.random.normal(KEY, inputs)
    name = "DenseGeneral_0"
    params = {name: jax.jit(layer.init)(KEY, x)["params"]}
    weights = matrix(lambda x: layer.apply({"params": pruned(params, "2:4")[name]}, x), x)
    assert_groups(weights, "2:4")
    stacked = jax.tree.map(lambda w: jnp.stack([w] * 6), params)
    assert nmjax.make_plan(stacked, "2:4")[f"{name}/kernel"].reduction_axes == tuple(
        range(-len(inputs) - len(outputs), -len(outputs))
    )


def test_linen_transposed_conv():
    x = jnp.ones((1, 1, 16))  # One input pixel reaches one tap of each of 3 x 3 output pixels.
    conv = nn.ConvTranspose(5, (3, 3), padding="VALID")
    sparse = pruned(jax.jit(conv.init)(KEY, x[None])["params"], "2:4")
    assert_groups(matrix(lambda x: conv.apply({"params": sparse}, x[None]), x), "2:4")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_attention_in_and_out(library, pattern):
    if library == "linen":
        attention = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=24, out_features=8)
        params = jax.jit(attention.init)(KEY, jnp.ones((1, 3, 16)))["params"]
    else:
        attention = nnx.MultiHeadAttention(
            num_heads=4,
            in_features=16,
            qkv_features=24,
            out_features=8,
            decode=False,
            rngs=nnx.Rngs(0),
        )
        params = nnx.state(attention, nnx.Param)
    plan = nmjax.make_plan(params, pattern)
    sparse = named_leaves(nmjax.prune(params, plan))
    for projection in ("query", "key", "value"):
        assert plan[f"{projection}/kernel"].reduction_axes == (-3,)
        assert plan[f"{projection}/kernel"].output_axes == (-2, -1)
        layer = nn.DenseGeneral((4, 6), use_bias=False)
        variables = {"params": {"kernel": sparse[f"{projection}/kernel"]}}
        weights = matrix(lambda x, v=variables, a=layer: a.apply(v, x), jnp.ones(16))
        assert weights.shape == (24, 16)
        assert_groups(weights, pattern)
    assert plan["out/kernel"].reduction_axes == (-3, -2)
    assert plan["out/kernel"].output_axes == (-1,)
    layer = nn.DenseGeneral(8, axis=(-2, -1), use_bias=False)
    variables = {"params": {"kernel": sparse["out/kernel"]}}
    weights = matrix(lambda x: layer.apply(variables, x), jnp.ones((4, 6)))
    assert weights.shape == (8, 24)
    # Head size 6: the groups run on from one head into the next, as the matmul's inputs do.
    assert_groups(weights, pattern)


def test_the_layers_used_for_attention_are_those_of_attention():
    attention = nn.MultiHeadDotProductAttention(num_heads=4, out_features=8)
    params = jax.jit(attention.init)(KEY, jnp.ones((1, 3, 16)))["params"]
    query = jax.jit(nn.DenseGeneral((4, 4)).init)(KEY, jnp.ones((1, 16)))["params"]
    out = jax.jit(nn.DenseGeneral(8, axis=(-2, -1)).init)(KEY, jnp.ones((1, 4, 4)))["params"]
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes["query"] == jax.tree.map(jnp.shape, query)
    assert shapes["out"] == jax.tree.map(jnp.shape, out)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_equinox_linear(pattern):
    linear = eqx.nn.Linear(16, 6, key=KEY)
    assert nmjax.make_plan(linear, pattern)["weight"].reduction_axes == (-1,)
    assert_groups(matrix(pruned(linear, pattern), jnp.ones(16)), pattern)


def test_equinox_conv():
    conv = eqx.nn.Conv2d(8, 5, 3, key=KEY)
    assert nmjax.make_plan(conv, "2:4")["weight"].reduction_axes == (-3,)
    jacobian = matrix(pruned(conv, "2:4"), jnp.ones((8, 3, 3)))
    channels_last = jacobian.reshape(5, 8, 9).transpose(0, 2, 1).reshape(5, -1)
    by_tap = taps(channels_last, (3, 3), 8)
    assert len(by_tap) == 9
    for tap in by_tap:
        assert_groups(tap, "2:4")


def test_equinox_attention_and_gru():
    attention = eqx.nn.MultiheadAttention(2, 8, key=KEY)
    sparse = pruned(attention, "2:4")
    for part in (sparse.query_proj, sparse.key_proj, sparse.value_proj, sparse.output_proj):
        assert_groups(matrix(part, jnp.ones(8)), "2:4")
    gru = pruned(eqx.nn.GRUCell(8, 4, key=KEY), "2:4")
    assert_groups(np.asarray(gru.weight_ih), "2:4")
    assert_groups(np.asarray(gru.weight_hh), "2:4")


def test_plain_matrices():
    params = [(jnp.ones((16, 4)), jnp.ones(4)), (jnp.ones((4, 2)), jnp.ones(2))]
    # Nothing says whether they are stored as (in, out).
    plan = nmjax.make_plan(params, "2:4", axes={"/0$": -2})
    assert {name: leaf.reduction_axes for name, leaf in plan.items()} == {
        "0/0": (-2,),
        "1/0": (-2,),
    }
    (w, _), _ = nmjax.prune(jax.tree.map(lambda p: p + 0.1, params), plan)
    assert_groups(matrix(lambda x: x @ w, jnp.ones(16)), "2:4")
