"""RAFT: parameters as published, upsampling against loops, what each step returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.synthetic_flow import grained
from experiments.models.flow.correlation import center_and_scale, correlation_pyramid
from experiments.models.flow.encoder import Encoder
from experiments.models.flow.raft import Raft, convex_upsample, tiny_raft
from nmjax.linen import make_plan

upsample_jit = jax.jit(convex_upsample, static_argnums=2)

IMAGE = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)


def shapes(model):
    init = lambda key, a, b: model.init(key, a, b, train=False)  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0), IMAGE, IMAGE)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameters_are_the_published_models():
    variables = shapes(Raft())
    # torchvision lists 5,257,536 for raft_large, which is the released RAFT.
    assert count(variables["params"]) == 5_257_536
    parts = {name: count(part) for name, part in variables["params"].items()}
    assert sum(parts.values()) == 5_257_536
    assert set(parts) == {"features", "context", "update"}
    # Instance normalization has no parameters, batch normalization has two a channel.
    assert not any("norm" in name for name in variables["params"]["features"])
    assert variables["params"]["context"]["stem_norm"]["scale"].shape == (64,)


def test_all_convolutions_but_those_of_three_and_two_channels_can_be_sparse():
    for model in (Raft(), tiny_raft()):
        exclude = ("/stem/", "/flow1/")
        plan = make_plan(model, "2:4", IMAGE, IMAGE, call={"train": False}, exclude=exclude)
        dense = {name for name in plan.dense if name.endswith("kernel")}
        assert dense == {
            "features/stem/kernel",
            "context/stem/kernel",
            "update/motion/flow1/kernel",
        }


def test_sizes_of_the_published_model():
    model = Raft(iterations=3)
    image = jax.ShapeDtypeStruct((2, 64, 128, 3), jnp.float32)

    def run(variables, a, b, train):
        return model.apply(variables, a, b, train=train, mutable=["batch_stats"] if train else [])

    variables = shapes(model)
    for train, steps in ((True, 3), (False, 1)):
        flows, _ = jax.eval_shape(lambda v, a, b, t=train: run(v, a, b, t), variables, image, image)
        assert flows.shape == (steps, 2, 64, 128, 2)


def test_sides_must_fit_the_strides():
    image = jnp.zeros((1, 64, 60, 3))
    with pytest.raises(ValueError, match="multiples of 8"):
        jax.eval_shape(lambda key: Raft().init(key, image, image, train=False), jax.random.key(0))


def test_steps_share_their_parameters():
    assert count(shapes(tiny_raft(iterations=1))) == count(shapes(tiny_raft(iterations=5)))


def test_untrained_features_of_the_small_model_find_a_shift():
    texture = 2 * grained("train")[0][40:120, 40:120].astype(np.float32) - 1
    # What lies at (x, y) in the first image lies at (x + 8, y - 4) in the second.
    images = np.stack([texture[8:72, 8:72], texture[12:76, :64]])
    np.testing.assert_array_equal(images[0, 4:, :-8], images[1, :-4, 8:])
    model = tiny_raft()
    encoder = Encoder(model.widths, model.strides, model.features, "instance")
    maps, _ = jax.jit(lambda x: encoder.init_with_output(jax.random.key(0), x, train=False))(images)
    (level,) = correlation_pyramid(*np.split(np.asarray(center_and_scale(maps)), 2), levels=1)
    best = np.asarray(level).reshape(16, 16, 256).argmax(axis=2)
    y, x = np.mgrid[:16, :16]
    # A pixel of the maps is four of the images.
    found = (best % 16 - x == 2) & (best // 16 - y == -1)
    # Of the pixels that are in sight in both images.
    assert found[1:, :-2].mean() > 0.5


@settings(max_examples=10, deadline=None)
@given(
    sides=st.sampled_from([(1, 1), (2, 3), (3, 2)]),
    factor=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_upsampling_against_loops(sides, factor, seed):
    rows, columns = sides
    rng = np.random.default_rng(seed)
    flow = rng.standard_normal((2, rows, columns, 2)).astype(np.float32)
    logits = rng.standard_normal((2, rows, columns, 9 * factor**2)).astype(np.float32)
    found = np.asarray(upsample_jit(flow, logits, factor))
    assert found.shape == (2, factor * rows, factor * columns, 2)
    for b, y, x in np.ndindex(found.shape[:3]):
        i, a, j, c = y // factor, y % factor, x // factor, x % factor
        weights = np.exp(logits[b, i, j].reshape(9, factor, factor)[:, a, c].astype(float))
        expected = np.zeros(2)
        for k, weight in enumerate(weights / weights.sum()):
            row, column = i + k // 3 - 1, j + k % 3 - 1
            if 0 <= row < rows and 0 <= column < columns:
                expected += weight * factor * flow[b, row, column]
        np.testing.assert_allclose(found[b, y, x], expected, rtol=1e-4, atol=1e-5)


def test_upsampling_a_constant_flow_scales_it_inside():
    flow = np.full((1, 4, 4, 2), (1.0, -2.0), np.float32)
    logits = np.random.default_rng(0).standard_normal((1, 4, 4, 9 * 4)).astype(np.float32)
    inside = np.asarray(convex_upsample(flow, logits, 2))[0, 2:-2, 2:-2]
    np.testing.assert_allclose(inside, np.broadcast_to((2.0, -4.0), inside.shape), rtol=1e-5)
