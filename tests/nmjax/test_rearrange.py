"""Filter rearrangement: networks compute what they did, and blocks hold filters of a size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from experiments.models.image_networks import make_image_network
from experiments.models.resnet import BottleneckBlock, ResNet
from nmjax.trees import named_leaves

KEY = jax.random.key(0)

# Small enough for a test, with every kind of block, shortcut and projection.
NETWORKS = {
    "resnet": lambda: make_image_network("resnet8", 10, stem="cifar"),
    "bottleneck resnet": lambda: ResNet((2, 1), BottleneckBlock, 10, width=8, stem="imagenet"),
    "mobilenet": lambda: make_image_network("mobilenet_v1", 10, stem="cifar"),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A forward pass, parameters and statistics as training leaves them, images, a plan."""
    model = NETWORKS[request.param]()
    images = jax.random.normal(KEY, (2, 16, 16, 3))
    variables = jax.jit(lambda: model.init(KEY, images, False))()
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(0)
    leaves = [
        # Filters of very different sizes; scales, shifts and statistics that all differ.
        jnp.asarray(w * rng.lognormal(size=w.shape[-1]) if w.ndim > 1 else w + rng.random(w.shape))
        for w in leaves
    ]
    variables = jax.tree.unflatten(structure, [leaf.astype(jnp.float32) for leaf in leaves])
    plan = nmjax.make_plan(variables["params"], "1x8@0.5/layer", exclude=("^stem/", "^head/"))

    def forward(params, state, images):
        return model.apply({"params": params, **state}, images, False)

    state = {"batch_stats": variables["batch_stats"]}
    moved = nmjax.rearrange_filters(forward, variables["params"], state, images, plan=plan)
    return jax.jit(forward), (variables["params"], state), moved, images, plan


def test_the_network_computes_what_it_did(network):
    forward, before, after, images, _ = network
    logits = forward(*before, images)
    scale = jnp.abs(logits).max()
    np.testing.assert_allclose(forward(*after, images) / scale, logits / scale, atol=2e-5)


def test_each_leaf_is_only_reordered_and_all_with_blocks_are(network):
    _, before, after, _, plan = network
    named = [named_leaves(tree) for tree in (before, after)]
    assert list(named[0]) == list(named[1])
    for name, leaf in named[0].items():
        assert leaf.shape == named[1][name].shape
        np.testing.assert_array_equal(np.sort(leaf, axis=None), np.sort(named[1][name], axis=None))
        if name.removeprefix("0/") in plan:
            assert (leaf != named[1][name]).any(), name


def test_filters_of_a_layer_that_is_not_added_to_others_are_sorted(network):
    _, _, (params, _), _, plan = network
    sorted_layers = 0
    for name, w in named_leaves(params).items():
        if name in plan and not any(part in name for part in ("conv2", "conv3", "shortcut")):
            norms = np.abs(np.asarray(w)).sum(axis=(0, 1, 2))
            assert (np.diff(norms) <= 1e-3 * norms[0]).all(), name
            sorted_layers += 1
    assert sorted_layers >= 3


def test_blocks_keep_more_of_the_weights(network):
    """What it is for: the kept weights' share of the L1 norm grows."""
    _, (before, _), (after, _), _, plan = network

    def kept(params):
        pruned = named_leaves(nmjax.prune(params, plan))
        return sum(float(jnp.abs(pruned[name]).sum()) for name in plan)

    assert kept(after) > 1.01 * kept(before)


def test_what_no_block_needs_stays_where_it_is():
    params = {"a": jnp.array([[1.0, 3.0], [2.0, 9.0]]), "c": jnp.ones((2, 2))}

    def forward(params, state, x):
        return jnp.tanh(x @ params["a"]) @ params["c"]

    plan = nmjax.make_plan(params, "1:2")
    same, state = nmjax.rearrange_filters(forward, params, {}, jnp.ones((1, 2)), plan=plan)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert state == {}
    # Of a plan with blocks the logits stay too: c's outputs are the network's.
    plan = nmjax.make_plan(params, "1x2@0.5", exclude="a")
    params["c"] = jnp.array([[1.0, 2.0], [1.0, 2.0]])
    same, _ = nmjax.rearrange_filters(forward, params, {}, jnp.ones((1, 2)), plan=plan)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_equal_filters_keep_their_order():
    params = {"a": jnp.array([[2.0, 1.0, 2.0, 1.0]]), "b": jnp.arange(4.0)[:, None]}

    def forward(params, state, x):
        return (x @ params["a"]) ** 2 @ params["b"]

    plan = nmjax.make_plan(params, "1x2@0", include="a", axes={"a": 0})
    after, _ = nmjax.rearrange_filters(forward, params, {}, jnp.ones((1, 1)), plan=plan)
    assert after["b"].ravel().tolist() == [0, 2, 1, 3]


def test_parameters_that_do_not_fit():
    plan = nmjax.make_plan({"a": jnp.ones((2, 4))}, "1x2@0.5")
    with pytest.raises(ValueError, match="a: planned as"):
        nmjax.rearrange_filters(
            lambda p, s, x: x @ p["a"], {"a": jnp.ones((4, 4))}, {}, jnp.ones(4), plan=plan
        )
