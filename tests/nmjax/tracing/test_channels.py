"""Channels that are free to move: moving them changes nothing, and the right ones are found."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.masks.nm import nm_mask
from nmjax.tracing.channel_order import Channels, permute_channels
from nmjax.tracing.channels import find_channels
from nmjax.trees.leaves import named_leaves

KEY = jax.random.key(0)


class Separable(nn.Module):
    """Depthwise and pointwise convolutions, pooling, a residual add, two heads."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(True, name="norm")(nn.Conv(6, (3, 3), name="stem")(x)))
        y = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)
        y = nn.max_pool(nn.silu(y), (2, 2), (1, 1), "SAME")
        y = nn.Conv(12, (1, 1), name="wide")(y)
        y = nn.Conv(6, (1, 1), name="narrow")(nn.LayerNorm(name="layer_norm")(jnp.tanh(y)))
        x = nn.avg_pool(x + y, (2, 2))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


class Attention(nn.Module):
    """A transformer block."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="embed")(x)
        x = x + nn.MultiHeadDotProductAttention(3, name="attention")(nn.LayerNorm()(x))
        x = x + nn.Dense(12, name="down")(nn.gelu(nn.Dense(20, name="up")(nn.LayerNorm()(x))))
        return nn.Dense(4, name="head")(x)


class Ordered(nn.Module):
    """Whatever fixes an order: flattening, slices, concatenation, groups, constants, a scan."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="sliced")(x)
        x = nn.Conv(8, (3, 3), name="grouped")(jnp.concatenate([x[..., :3], x[..., 3:]], axis=-1))
        x = nn.Conv(8, (3, 3), feature_group_count=2, name="constant")(x)
        x = nn.Conv(2, (1, 1), name="flattened")(x * jnp.arange(8.0)[None, None, None])
        x = nn.Dense(5, name="carried")(x.reshape(x.shape[0], -1))
        x, _ = jax.lax.scan(lambda carry, _: (jnp.roll(carry, 1, -1), None), x, None, 3)
        return nn.Dense(4, name="head")(x)


NETWORKS = {
    "separable": (Separable(), (2, 8, 8, 3)),
    "attention": (Attention(), (2, 5, 7)),
    "ordered": (Ordered(), (2, 6, 6, 3)),
}
# Flax's avg_pool divides floats by integers.
PROMOTES = pytest.mark.not_under("jax_numpy_dtype_promotion")
SEPARABLE = pytest.param("separable", marks=PROMOTES)


def make(name):
    """A forward pass, variables whose channels all differ, and an input."""
    network, shape = NETWORKS[name]
    x = jax.random.normal(KEY, shape)
    variables = jax.jit(network.init)(KEY, x)
    leaves, structure = jax.tree.flatten(variables)
    leaves = [
        w + 0.3 * np.abs(np.random.default_rng(i).standard_normal(w.shape, np.float32))
        for i, w in enumerate(leaves)
    ]
    return jax.jit(network.apply), jax.tree.unflatten(structure, leaves), x


def all_of(channels):
    return {f"{name}:{axis}" for name, axis in (*channels.writers, *channels.followers)}


@pytest.mark.parametrize("name", [SEPARABLE, "attention", "ordered"])
def test_moving_free_channels_changes_nothing(name):
    forward, variables, x = make(name)
    rng, shuffled = np.random.default_rng(0), variables
    for channels in find_channels(forward, variables, x):
        leaf, axis = channels.writers[0]
        order = rng.permutation(named_leaves(variables)[leaf].shape[axis])
        shuffled = permute_channels(shuffled, channels, order)
    np.testing.assert_allclose(forward(shuffled, x), forward(variables, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [SEPARABLE, "attention"])
def test_leaving_one_axis_behind_does_change_something(name):
    """The control: every axis that is found belongs there."""
    forward, variables, x = make(name)
    before = forward(variables, x)
    for channels in find_channels(forward, variables, x):
        leaf, axis = channels.writers[0]
        order = np.roll(range(named_leaves(variables)[leaf].shape[axis]), 1)
        for left_out in channels.followers:
            others = tuple(axis for axis in channels.followers if axis != left_out)
            torn = permute_channels(variables, Channels(channels.writers, others), order)
            # A shift of all logits of a row is lost in the softmax: the bias of keys does nothing.
            if "key/bias" not in left_out[0]:
                assert jnp.abs(forward(torn, x) - before).max() > 1e-4, left_out


STREAM = """
    params/stem/kernel:-1 params/stem/bias:-1 params/norm/scale:-1 params/norm/bias:-1
    batch_stats/norm/mean:-1 batch_stats/norm/var:-1 params/depthwise/kernel:-1
    params/depthwise/bias:-1 params/wide/kernel:-2 params/narrow/kernel:-1 params/narrow/bias:-1
    params/head/kernel:-2
"""
HIDDEN = """
    params/wide/kernel:-1 params/wide/bias:-1 params/layer_norm/scale:-1 params/layer_norm/bias:-1
    params/narrow/kernel:-2
"""
HEADS = """
    params/attention/query/kernel:-2 params/attention/query/bias:-2 params/attention/key/kernel:-2
    params/attention/key/bias:-2 params/attention/value/kernel:-2 params/attention/value/bias:-2
    params/attention/out/kernel:-3
"""


@PROMOTES
def test_which_channels_a_convolutional_network_ties():
    forward, variables, x = make("separable")
    found = find_channels(forward, variables, x)
    assert [all_of(channels) for channels in found] == [set(STREAM.split()), set(HIDDEN.split())]
    assert set(found[0].writers) == {("params/stem/kernel", -1), ("params/narrow/kernel", -1)}
    assert found[1].writers == (("params/wide/kernel", -1),)


def test_which_channels_attention_ties():
    forward, variables, x = make("attention")
    found = [all_of(channels) for channels in find_channels(forward, variables, x)]
    assert set(HEADS.split()) in found
    assert {"params/up/kernel:-1", "params/up/bias:-1", "params/down/kernel:-2"} in found
    assert len(found) == 5  # And the stream, and the heads' parts: of queries, and of values.


def test_an_order_that_matters_stays():
    forward, variables, x = make("ordered")
    assert find_channels(forward, variables, x) == []


def test_weights_used_twice_tie_all_their_uses():
    def forward(params, x):
        hidden = jnp.tanh(x @ params["in"])
        return jnp.tanh(hidden @ params["square"]) @ params["square"] @ params["out"]

    params = {"in": jnp.ones((3, 8)), "square": jnp.ones((8, 8)), "out": jnp.ones((8, 2))}
    (channels,) = find_channels(forward, params, jnp.ones((1, 3)))
    assert all_of(channels) == {"in:-1", "square:-2", "square:-1", "out:-2"}


def test_what_is_done_to_a_weight_before_its_use_is_followed():
    def forward(params, x):
        w = jnp.where(params["w"] > 0, params["w"], 0).astype(jnp.bfloat16)
        w = w.T.reshape(8, 1, 3).squeeze(1).T.astype(jnp.float32)
        return jax.checkpoint(jax.nn.relu)(x @ w) @ params["out"]

    params = {"w": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
    (channels,) = find_channels(forward, params, jnp.ones((1, 3)))
    assert all_of(channels) == {"w:-1", "out:-2"}


def test_the_order_within_the_groups_of_a_mask_stays():
    variables = {name: jnp.ones((8, 8)) for name in ("first", "second", "third")}

    def forward(variables, x):
        second = jnp.where(nm_mask(variables["second"], 2, 4), variables["second"], 0)
        return x @ variables["first"] @ second @ variables["third"]

    found = find_channels(forward, variables, jnp.ones((1, 8)))
    assert found == [Channels((("second", -1),), (("third", -2),))]


@PROMOTES
def test_shapes_are_enough():
    forward, variables, x = make("separable")
    abstract = jax.eval_shape(lambda: (variables, x))
    assert find_channels(forward, *abstract) == find_channels(forward, variables, x)
