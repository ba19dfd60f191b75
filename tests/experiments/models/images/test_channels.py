"""Reordered ResNets and MobileNets compute what they did before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.images.channels import network_channels
from experiments.models.images.mobilenet import MobileNetV1
from experiments.models.images.resnet import BasicBlock, BottleneckBlock, ResNet
from nmjax.tracing.channel_order import l1_order, permute_channels, sort_channels
from nmjax.tracing.channels import find_channels
from nmjax.trees.leaves import map_named, named_leaves

NETWORKS = {
    "basic": ResNet((2, 2, 1), BasicBlock, 10, width=8, stem="cifar"),
    "bottleneck": ResNet((2, 2), BottleneckBlock, 10, width=8, stem="imagenet"),
    "mobilenet": MobileNetV1(10, stem="cifar"),
}


def settle(name, leaf):
    """Values as training leaves them: no scale is 1, no statistic is that of nothing."""
    seed = sum(map(ord, name))
    noise = np.random.default_rng(seed).uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    return leaf * noise if name.endswith("kernel") else jnp.asarray(noise)


@pytest.mark.parametrize(
    "name", ["basic", *(pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS if n != "basic")]
)
def test_any_order_leaves_the_function_as_it_is(name):
    network = NETWORKS[name]
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    init = jax.jit(lambda key: dict(network.init(key, x, train=False)))
    variables = map_named(settle, init(jax.random.key(1)))
    apply = jax.jit(lambda variables: network.apply(variables, x, train=False))
    expected, permuted = apply(variables), variables
    rng = np.random.default_rng(0)
    for channels in network_channels(variables):
        count = l1_order(variables, channels).size
        permuted = permute_channels(permuted, channels, rng.permutation(count))
    tolerance = {"rtol": 2e-4, "atol": 2e-4 * float(jnp.abs(expected).max())}
    np.testing.assert_allclose(apply(permuted), expected, **tolerance)
    np.testing.assert_allclose(
        apply(sort_channels(variables, network_channels(variables))), expected, **tolerance
    )
    before, after = named_leaves(variables), named_leaves(permuted)
    kernels = [name for name in before if name.endswith("kernel")]
    assert not [name for name in kernels if np.array_equal(before[name], after[name])]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_traced_network_tells_the_same_channels(name):
    network, x = NETWORKS[name], jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(lambda: dict(network.init(jax.random.key(1), x, train=False)))
    found = find_channels(lambda v, x: network.apply(v, x, train=False), variables, x)

    def as_sets(groups):
        return {(frozenset(c.writers), frozenset(c.followers)) for c in groups}

    assert as_sets(found) == as_sets(network_channels(variables))
    assert len(found) == len(network_channels(variables))


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="not the variables of a ResNet"):
        network_channels({"params": {"Dense_0": {"kernel": jnp.ones((2, 2))}}})
