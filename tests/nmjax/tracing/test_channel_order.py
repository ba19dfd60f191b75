"""Channels in another order: the same function, by way of other weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmjax
from nmjax.tracing.channel_order import Channels, l1_order, permute_channels, sort_channels

KEY = jax.random.key(0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        return nn.Dense(3, name="head")(nn.Dense(8, name="second")(x))


X = jax.random.normal(KEY, (2, 6, 6, 4))
PARAMS = jax.jit(Net().init)(KEY, X)["params"]
PARAMS = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(KEY, w.shape), PARAMS)
CHANNELS = Channels(
    (("first/kernel", -1),),
    (("first/bias", 0), ("depthwise/kernel", -1), ("depthwise/bias", 0), ("second/kernel", -2)),
)


@given(st.permutations(range(8)))
def test_any_order_leaves_the_function_as_it_is(order):
    permuted = permute_channels(PARAMS, CHANNELS, order)
    np.testing.assert_array_equal(
        permuted["first"]["kernel"], PARAMS["first"]["kernel"][..., np.array(order)]
    )
    np.testing.assert_allclose(
        Net().apply({"params": permuted}, X), Net().apply({"params": PARAMS}, X), atol=1e-5
    )
    back = permute_channels(permuted, CHANNELS, np.argsort(order))
    jax.tree.map(np.testing.assert_array_equal, back, PARAMS)


def test_a_forgotten_reader_changes_the_function():
    forgetful = Channels(CHANNELS.writers, CHANNELS.followers[:-1])
    permuted = permute_channels(PARAMS, forgetful, range(7, -1, -1))
    changed = Net().apply({"params": permuted}, X) - Net().apply({"params": PARAMS}, X)
    assert np.abs(changed).max() > 1e-2


def test_sorting_by_norm():
    order = l1_order(PARAMS, CHANNELS)
    norms = np.abs(np.asarray(PARAMS["first"]["kernel"], np.float64)).sum(axis=(0, 1, 2))
    np.testing.assert_array_equal(order, np.argsort(-norms, kind="stable"))
    after = sort_channels(PARAMS, [CHANNELS])
    norms = np.abs(np.asarray(after["first"]["kernel"])).sum(axis=(0, 1, 2))
    assert all(norms[:-1] >= norms[1:])
    np.testing.assert_array_equal(l1_order(after, CHANNELS), np.arange(8))


def test_norms_of_several_writers_are_added():
    variables = {"a": jnp.array([[3.0, 1.0, 2.0]]), "c": jnp.array([[0.0, 1.5, 2.0]])}
    channels = Channels((("a", -1), ("c", -1)))
    assert l1_order(variables, channels).tolist() == [2, 0, 1]
    assert l1_order({"a": jnp.ones((2, 4))}, Channels((("a", -1),))).tolist() == [0, 1, 2, 3]


def test_blocks_of_sorted_channels_keep_more():
    w = jax.random.normal(KEY, (32, 64)) * jnp.exp(jax.random.normal(jax.random.key(1), (1, 64)))
    variables = {"kernel": w}
    plan = nmjax.make_plan(variables, "1x8@0.5/layer")
    after = sort_channels(variables, [Channels((("kernel", -1),))])
    kept = [jnp.abs(nmjax.prune(v, plan)["kernel"]).sum() for v in (variables, after)]
    assert kept[1] > 1.05 * kept[0]


@pytest.mark.parametrize(
    ("channels", "order", "message"),
    [
        (
            Channels((("none", -1),)),
            range(8),
            "no leaf is named 'none'; the leaves are",
        ),
        (Channels((("first/bias", -2),)), range(8), r"first/bias of shape \(8,\) has no axis -2"),
        (
            Channels((("first/kernel", -1),), (("first/kernel", -2),)),
            range(8),
            r"8 in first/kernel of shape \(3, 3, 4, 8\) along axis -1\n  4 in first/kernel",
        ),
        (CHANNELS, [0, 0, 1, 2, 3, 4, 5, 6], "each of 0 ... 7 once"),
        (CHANNELS, range(7), "each of 0 ... 7 once"),
    ],
)
def test_bad_input(channels, order, message):
    with pytest.raises(ValueError, match=message):
        permute_channels(PARAMS, channels, list(order))


def test_no_writers():
    with pytest.raises(ValueError, match="without writers"):
        l1_order(PARAMS, Channels((), (("first/bias", 0),)))
