"""The residual networks against published counts, and against each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.images.resnet import RESNETS, BasicBlock, BottleneckBlock, make_resnet

IMAGE = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def small():
    model = make_resnet("resnet8", 10, stem="cifar")
    return jax.jit(lambda key: model.init(key, IMAGE, train=False))(jax.random.key(0))


def shapes(model, size, channels=3):
    image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key, image: model.init(key, image, train=False), key, image)


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def multiply_adds(model, size, channels=3):
    """Counted from the traced program: output elements times the terms summed in each."""
    variables = shapes(model, size, channels)
    image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, image)
    return sum(terms(equation) for equation in equations(jaxpr.jaxpr))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        inner = [p for p in equation.params.values() if hasattr(p, "jaxpr")]
        yield from [equation] if not inner else equations(inner[0].jaxpr)


def terms(equation):
    outputs = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "conv_general_dilated":
        height, width, channels, _ = equation.invars[1].aval.shape
        return outputs * height * width * channels
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return outputs * math.prod(equation.invars[0].aval.shape[a] for a in contracted)
    return 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
    ],
)
def test_parameter_counts_are_the_published_ones(name, parameters):
    assert count(shapes(make_resnet(name, 1000), 224)["params"]) == parameters


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_173_962), ("resnet20", 272_474)])
def test_parameter_counts_for_small_images(name, parameters):
    assert count(shapes(make_resnet(name, 10, stem="cifar"), 32)["params"]) == parameters


@pytest.mark.parametrize(
    ("name", "giga"), [("resnet18", 1.814), ("resnet34", 3.664), ("resnet50", 4.089)]
)
def test_multiply_adds_are_the_published_ones(name, giga):
    assert round(multiply_adds(make_resnet(name, 1000), 224) / 1e9, 3) == giga


def test_multiply_adds_of_one_small_network_by_hand():
    # 8x8 gray, widths 16, 32, 64 at 8x8, 4x4, 2x2; each stage but the first has a projection.
    by_hand = 64 * 9 * 16  # stem
    by_hand += 64 * 9 * (16 * 16 * 2)
    by_hand += 16 * (9 * (16 * 32 + 32 * 32) + 16 * 32)
    by_hand += 4 * (9 * (32 * 64 + 64 * 64) + 32 * 64)
    by_hand += 64 * 10
    assert multiply_adds(make_resnet("resnet8", 10, stem="cifar"), 8, channels=1) == by_hand


def test_where_the_image_shrinks():
    # The 3x3 convolution of a bottleneck strides, not the 1x1 before it.
    model = make_resnet("resnet50", 10)
    _, state = jax.eval_shape(
        lambda image: model.apply(
            shapes_as_zeros(model), image, train=False, capture_intermediates=True
        ),
        jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),
    )
    seen = state["intermediates"]
    assert seen["stem"]["__call__"][0].shape == (1, 112, 112, 64)
    assert seen["stage1_block1"]["__call__"][0].shape == (1, 56, 56, 256)
    assert seen["stage2_block1"]["conv1"]["__call__"][0].shape == (1, 56, 56, 128)
    assert seen["stage2_block1"]["conv2"]["__call__"][0].shape == (1, 28, 28, 128)
    assert seen["stage4_block3"]["__call__"][0].shape == (1, 7, 7, 2048)


def shapes_as_zeros(model):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes(model, 224))


def test_convolutions_start_with_the_variance_of_the_recipe(small):
    kernel = np.asarray(small["params"]["stage3_block1"]["conv2"]["kernel"])
    assert kernel.shape == (3, 3, 64, 64)
    expected = math.sqrt(2 / (9 * 64))
    assert abs(kernel.std() / expected - 1) < 0.02
    # A normal truncated at two sigmas would stop at 2.3 standard deviations.
    assert np.abs(kernel).max() > 3 * expected
    head = np.asarray(small["params"]["head"]["kernel"])
    assert 0.9 / 8 < np.abs(head).max() <= 1 / 8


@pytest.mark.parametrize(("block", "last"), [(BasicBlock, "norm2"), (BottleneckBlock, "norm3")])
def test_zero_init_makes_a_block_start_as_its_shortcut(block, last):
    module = block(2, zero_init_last=True)
    image = jnp.ones((1, 4, 4, 2 * block.expansion))
    variables = module.init(jax.random.key(0), image, train=False)
    scales = {name: leaf["scale"] for name, leaf in variables["params"].items() if "scale" in leaf}
    assert {name for name, scale in scales.items() if not scale.any()} == {last}
    np.testing.assert_array_equal(module.apply(variables, image, train=False), image)


def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(small):
    model = make_resnet("resnet8", 10, stem="cifar", dtype=jnp.bfloat16)
    assert shapes(model, 8) == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small)
    logits, updated = jax.eval_shape(
        lambda v: model.apply(v, IMAGE, train=True, mutable=["batch_stats"]), small
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((updated, logits))} == {jnp.dtype("float32")}
    program = str(jax.make_jaxpr(lambda v: model.apply(v, IMAGE, train=False))(small))
    convolutions = [line for line in program.splitlines() if "= conv_general_dilated" in line]
    assert convolutions
    assert all("bf16" in line for line in convolutions)


def test_bfloat16_computes_the_same_function(small):
    half, full = (
        jax.jit(
            make_resnet("resnet8", 10, stem="cifar", dtype=dtype).apply, static_argnames="train"
        )(small, IMAGE, train=False)
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    np.testing.assert_allclose(half, full, atol=0.05 * float(jnp.abs(full).max()))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"no model named 'resnet19'; choose from resnet18"):
        make_resnet("resnet19", 10)
    with pytest.raises(ValueError, match="stem must be"):
        shapes(make_resnet("resnet8", 10, stem="patch"), 8)
    assert "resnet50" in RESNETS
