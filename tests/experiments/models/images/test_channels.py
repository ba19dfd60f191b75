"""The channels of ResNets and MobileNets are found; in another order nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    found = find_channels(lambda v, x: network.apply(v, x, train=False), variables, x)
    for channels in found:
        count = l1_order(variables, channels).size
        permuted = permute_channels(permuted, channels, rng.permutation(count))
    tolerance = {"rtol": 2e-4, "atol": 2e-4 * float(jnp.abs(expected).max())}
    np.testing.assert_allclose(apply(permuted), expected, **tolerance)
    np.testing.assert_allclose(apply(sort_channels(variables, found)), expected, **tolerance)
    before, after = named_leaves(variables), named_leaves(permuted)
    kernels = [name for name in before if name.endswith("kernel")]
    assert not [name for name in kernels if np.array_equal(before[name], after[name])]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_axis_of_channels_is_found_once(name):
    network, x = NETWORKS[name], jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(lambda: dict(network.init(jax.random.key(1), x, train=False)))
    found = find_channels(lambda v, x: network.apply(v, x, train=False), variables, x)
    writers = sorted(pair for channels in found for pair in channels.writers)
    followers = sorted(pair for channels in found for pair in channels.followers)
    leaves = set(named_leaves(variables))
    kernels = {leaf for leaf in leaves if leaf.endswith("kernel")}
    # A depthwise kernel has no axis of inputs, and follows what it is applied to.
    depthwise = {leaf for leaf in kernels if "/depthwise/" in leaf}
    across, ends = kernels - depthwise, {"params/stem/kernel", "params/head/kernel"}
    assert writers == sorted((leaf, -1) for leaf in across - {"params/head/kernel"})
    rest = leaves - kernels - {"params/head/bias"}
    assert followers == sorted(
        [*((leaf, -1) for leaf in rest | depthwise)]
        + [(leaf, -2) for leaf in across - {"params/stem/kernel"}]
    )
    # Streams of residual networks have several writers.
    assert (len(found) < len(across) - 1) == (name != "mobilenet")
    assert ends <= across
