"""MobileNetV1 against published counts; where the image shrinks; precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax.linen
from experiments.models.images.mobilenet import MobileNetV1, SeparableBlock


def shapes(model, size):
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    key = jax.random.key(0)
    return jax.eval_shape(lambda image: model.init(key, image, train=False), image)


def test_parameters_and_multiply_adds_are_the_published_ones():
    table = nmjax.linen.cost(MobileNetV1(1000), None, (1, 224, 224, 3), train=False)
    assert table.total.weights == 4_231_976
    assert table.total.macs == 568_740_352
    # Howard et al., Table 4: 569 million multiply-adds, 4.2 million parameters; Table 2: the 1x1
    # convolutions take 94.86 % of the former, the 3x3 depthwise ones 3.06 %.
    shares = {
        part: sum(leaf.macs for name, leaf in table.leaves.items() if part in name)
        for part in ("pointwise", "depthwise/")
    }
    assert round(table.total.macs / 1e6) == 569
    assert 100 * shares["pointwise"] / table.total.macs == pytest.approx(94.86, abs=0.05)
    assert 100 * shares["depthwise/"] / table.total.macs == pytest.approx(3.06, abs=0.05)


@pytest.mark.parametrize(("stem", "size", "sizes"), [("imagenet", 224, 112), ("cifar", 32, 32)])
def test_where_the_image_shrinks(stem, size, sizes):
    model = MobileNetV1(10, stem=stem)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    _, state = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False, capture_intermediates=True),
        shapes(model, size),
        image,
    )
    seen = state["intermediates"]
    steps = [1, 1, 2, 2, 4, 4, *6 * [8], 16, 16]
    for name, step in zip(["stem", *(f"block{i}" for i in range(1, 14))], steps, strict=True):
        assert seen[name]["__call__"][0].shape[1:3] == (sizes // step, sizes // step), name


def test_plans_leave_depthwise_convolutions_dense():
    exclude = ("^stem/", "^head/")
    plan = nmjax.linen.make_plan(
        MobileNetV1(10), "2:4", (1, 32, 32, 3), call={"train": False}, exclude=exclude
    )
    assert set(plan) == {f"block{i}/pointwise/kernel" for i in range(1, 14)}
    assert "depthwise" in plan.dense["block1/depthwise/kernel"]


def test_a_block_filters_each_channel_by_itself_then_mixes():
    block = SeparableBlock(2)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
    variables = block.init(jax.random.key(1), x, train=False)
    taps = np.asarray(variables["params"]["depthwise"]["kernel"])
    mix = np.asarray(variables["params"]["pointwise"]["kernel"])[0, 0]
    padded = np.pad(np.asarray(x[0]), ((1, 1), (1, 1), (0, 0)))
    filtered = np.zeros((4, 4, 3))
    for i in range(3):
        for j in range(3):
            filtered += padded[i : i + 4, j : j + 4] * taps[i, j, 0]
    scale = 1 / np.sqrt(1 + 1e-5)  # of a fresh normalization
    expected = np.maximum(scale * np.maximum(scale * filtered, 0) @ mix, 0)
    np.testing.assert_allclose(block.apply(variables, x, train=False)[0], expected, atol=1e-5)


def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32():
    variables = shapes(MobileNetV1(10, dtype=jnp.bfloat16), 32)
    logits, updated = jax.eval_shape(
        lambda v: MobileNetV1(10, dtype=jnp.bfloat16).apply(
            v, jnp.zeros((2, 32, 32, 3)), train=True, mutable=["batch_stats"]
        ),
        variables,
    )
    leaves = jax.tree.leaves((variables, updated, logits))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert logits.shape == (2, 10)


def test_unknown_stems_are_refused():
    with pytest.raises(ValueError, match="stem must be"):
        shapes(MobileNetV1(10, stem="patch"), 32)
