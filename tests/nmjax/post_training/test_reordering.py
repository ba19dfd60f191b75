"""Channels in orders under which a plan keeps more: the same function, and a higher score."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.post_training import Statistics, collect, permute_inputs, reorder_channels
from nmjax.trees.leaves import named_leaves


class ResNet(nn.Module):
    """A stem, a block that adds its input, and one that halves the image."""

    @nn.compact
    def __call__(self, x):
        x = self.normed(nn.Conv(8, (3, 3), use_bias=False, name="stem")(x))
        for i, (width, stride) in enumerate(((8, 1), (16, 2))):
            y = nn.Conv(width, (3, 3), strides=stride, use_bias=False, name=f"first{i}")(x)
            y = nn.Conv(width, (3, 3), use_bias=False, name=f"second{i}")(self.normed(y))
            if stride > 1:
                x = nn.Conv(width, (1, 1), strides=stride, name=f"projection{i}")(x)
            x = nn.relu(x + nn.BatchNorm(True)(y))
        return nn.Dense(4, name="head")(x.mean((1, 2)))

    def normed(self, x):
        return nn.relu(nn.BatchNorm(use_running_average=True)(x))


class MobileNet(nn.Module):
    """An inverted residual, with squeeze and excitation."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, name="stem")(x)
        y = nn.relu6(nn.BatchNorm(True)(nn.Conv(24, (1, 1), name="expand")(x)))
        y = nn.relu6(nn.Conv(24, (3, 3), feature_group_count=24, name="depthwise")(y))
        gate = nn.relu(nn.Dense(8, name="squeeze")(y.mean((1, 2), keepdims=True)))
        y = y * nn.sigmoid(nn.Dense(24, name="excite")(gate))
        x = x + nn.Conv(8, (1, 1), name="project")(y)
        return nn.Dense(4, name="head")(x.mean((1, 2)))


class Transformer(nn.Module):
    """A block before a gated one, with one stream."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="embed")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        y = nn.RMSNorm()(x)
        y = nn.silu(nn.Dense(24, name="gate")(y)) * nn.Dense(24, name="up")(y)
        return nn.Dense(4, name="head")(x + nn.Dense(16, name="down")(y))


NETWORKS = {
    "resnet": (ResNet(), (2, 8, 8, 4), {"stem"}),
    "mobilenet": (MobileNet(), (2, 8, 8, 4), {"stem"}),
    "transformer": (Transformer(), (2, 5, 8), {"embed"}),
}
RNG = np.random.default_rng(0)


def filled(shapes):
    """Numbers in place of shapes. Each channel has a scale of its own, as in trained networks."""

    def fill(leaf):
        scale = np.exp(RNG.normal(size=leaf.shape[-2:])) if len(leaf.shape) > 1 else 1
        return np.abs(0.3 * scale * RNG.normal(size=leaf.shape)).astype("float32") + 0.01

    return jax.tree.map(fill, shapes)


def kept_by(variables, plan, names=None):
    """The magnitude that each planned leaf keeps."""
    pruned = named_leaves(nmjax.prune(variables, plan))
    return {n: float(np.abs(np.asarray(pruned[n], np.float64)).sum()) for n in names or plan}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    module, shape, first = NETWORKS[request.param]
    x = RNG.normal(size=shape).astype("float32")
    # Both signs, so that ReLUs are neither all on nor all off; the running statistics are positive.
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), x))
    variables["params"] = jax.tree.map(
        lambda w: w * RNG.choice([-1, 1], w.shape).astype("float32"), variables["params"]
    )
    forward = jax.jit(module.apply)
    plan = nmjax.make_plan(variables, "2:4", forward=module.apply, inputs=(x,))
    return forward, variables, plan, x, first


def test_the_function_stays_and_the_plan_keeps_more(network):
    forward, variables, plan, x, first = network
    better = reorder_channels(forward, variables, plan, x)
    before, after = forward(variables, x), forward(better, x)
    assert np.isfinite(before).all()
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * np.abs(before).max())
    kept = {name: (kept_by(variables, plan)[name], kept_by(better, plan)[name]) for name in plan}
    assert sum(new for _, new in kept.values()) > 1.005 * sum(old for old, _ in kept.values())
    # The order of the network's inputs is fixed.
    for name, (old, new) in kept.items():
        if name.split("/")[1] in first:
            assert new == pytest.approx(old, rel=1e-6)
    # A second time finds nothing.
    again = reorder_channels(forward, better, plan, x)
    assert sum(kept_by(again, plan).values()) >= sum(kept_by(better, plan).values()) * (1 - 1e-6)


def test_a_plan_of_the_parameters_alone(network):
    forward, variables, plan, x, _ = network
    inner = nmjax.Plan(tuple((name.removeprefix("params/"), leaf) for name, leaf in plan.leaves))
    found = reorder_channels(forward, variables, inner, x)
    jax.tree.map(
        np.testing.assert_array_equal, found, reorder_channels(forward, variables, plan, x)
    )


def mlp(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


PARAMS = {"first": RNG.normal(size=(8, 16)), "second": np.exp(RNG.normal(size=(16, 12)))}
PARAMS = jax.tree.map(np.float32, PARAMS)
X = RNG.normal(size=(32, 8)).astype("float32")


@pytest.mark.parametrize("window", [None, 8, 64])
def test_hidden_channels_take_the_order_of_their_readers(window):
    plan = nmjax.make_plan(PARAMS, "2:4", forward=mlp, inputs=(X,))
    better = reorder_channels(mlp, PARAMS, plan, X, window=window)
    # A window that is wider than the layer falls back to pairs.
    order = permute_inputs(PARAMS["second"], "2:4", None if window == 64 else window)
    np.testing.assert_array_equal(better["second"], PARAMS["second"][order])
    np.testing.assert_array_equal(better["first"], PARAMS["first"][:, order])


def test_calibrated_scores():
    plan = nmjax.make_plan(PARAMS, "2:4", forward=mlp, inputs=(X,))
    statistics = collect(mlp, PARAMS, [X], plan, progress=False)
    better = reorder_channels(mlp, PARAMS, plan, X, statistics=statistics)
    root = np.sqrt(np.asarray(statistics.mean_square("second")))[0]
    order = permute_inputs(PARAMS["second"] * root[:, None], "2:4")
    np.testing.assert_array_equal(better["second"], PARAMS["second"][order])
    with pytest.raises(ValueError, match="there are no statistics of first"):
        reorder_channels(mlp, PARAMS, plan, X, statistics=Statistics({}, {}))


def test_two_readers_with_different_patterns_count_together():
    def forward(params, x):
        x = jnp.tanh(x @ params["first"])
        return x @ params["second"], x @ params["third"]

    params = PARAMS | {"third": np.exp(RNG.normal(size=(16, 4))).astype("float32")}
    rules = {"first": None, "third": "1:8"}
    plan = nmjax.make_plan(params, "2:4", rules=rules, forward=forward, inputs=(X,))
    better = reorder_channels(forward, params, plan, X)
    assert sum(kept_by(better, plan).values()) >= sum(kept_by(params, plan).values())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        forward(better, X),
        forward(params, X),
    )


def test_blocks_and_strided_groups_stay():
    plan = nmjax.make_plan(PARAMS, "1x4@0.5", rules={"second": "2:4/4"}, forward=mlp, inputs=(X,))
    jax.tree.map(np.testing.assert_array_equal, reorder_channels(mlp, PARAMS, plan, X), PARAMS)


def test_a_plan_of_another_network():
    plan = nmjax.make_plan({"other": jnp.ones((8, 4))}, "2:4", axes={"other": -2})
    with pytest.raises(ValueError, match="it has other, and they have first, second"):
        reorder_channels(mlp, PARAMS, plan, X)
    with pytest.raises(TypeError, match="expected a plan"):
        reorder_channels(mlp, PARAMS, "2:4", X)
