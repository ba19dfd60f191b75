"""Axes that names do not settle: transposed convolutions, given axes, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import nmjax
from nmjax.files.torch_layout import from_torch, masks_from_torch, save_torch, to_torch
from nmjax.trees.leaves import named_leaves
from tests.nmjax.packed_weights import prune_and_pack

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(
    torch is None, reason="PyTorch, the other side, is not installed: pip install 'nmjax[torch]'"
)
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def tensors(state):
    return {name: torch.from_numpy(array.copy()) for name, array in state.items()}


def channels_first(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


# Transposed convolutions


def torch_transposed(state, x, strides):
    """PyTorch's transposed convolution of images with channels last."""
    inputs, outputs, *taps = state["weight"].shape
    layer = getattr(torch.nn, f"ConvTranspose{len(taps)}d")(
        inputs, outputs, tuple(taps), strides, bias="bias" in state
    )
    layer.load_state_dict(tensors(state))
    with torch.no_grad():
        return np.moveaxis(layer(channels_first(x)).numpy(), 1, -1)


@needs_torch
@pytest.mark.parametrize("outputs", [6, 8])
@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("taps", [(3,), (3, 2), (2, 4, 3)])
def test_torch_computes_transposed_convolutions_of_flax(taps, transpose_kernel, outputs):
    x = normal(2, *(5,) * len(taps), 8)
    layer = nn.ConvTranspose(
        outputs, taps, (2,) * len(taps), padding="VALID", transpose_kernel=transpose_kernel
    )
    params = {"kernel": normal(*taps, *((outputs, 8) if transpose_kernel else (8, outputs)))}
    params["bias"] = normal(outputs)
    rules = {"transposed": "kernel", "transpose_kernel": "kernel" if transpose_kernel else ()}
    state = to_torch(params, **rules)
    assert state["weight"].shape == (8, outputs, *taps)
    y = torch_transposed(state, x, 2)
    np.testing.assert_allclose(y, layer.apply({"params": params}, x), rtol=1e-4, atol=1e-4)
    back = from_torch(state, params, **rules)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@needs_torch
def test_torch_computes_transposed_convolutions_of_nnx():
    layer = nnx.ConvTranspose(8, 8, (3, 3), padding="VALID", rngs=nnx.Rngs(0))
    x = normal(1, 4, 4, 8)
    y = torch_transposed(to_torch(nnx.state(layer), transposed="kernel"), x, 1)
    np.testing.assert_allclose(y, layer(x), rtol=1e-4, atol=1e-4)


@needs_torch
def test_torch_computes_transposed_convolutions_of_haiku():
    # As `haiku.Conv2DTranspose` calls it.
    x, w = normal(1, 4, 4, 8), normal(3, 2, 8, 8)
    numbers = ("NHWC", "HWOI", "NHWC")
    expected = lax.conv_transpose(x, w, (2, 2), "VALID", dimension_numbers=numbers)
    params = {"conv2_d_transpose": {"w": w}}
    state = to_torch(params, transposed="conv2_d_transpose")
    y = torch_transposed({"weight": state["conv2_d_transpose.w"]}, x, 2)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@needs_torch
def test_torch_computes_transposed_convolutions_of_equinox():
    eqx = pytest.importorskip("equinox")
    layer = eqx.nn.ConvTranspose2d(8, 8, (3, 2), 2, dtype=jnp.float32, key=jax.random.key(0))
    x = normal(1, 4, 4, 8)
    params = {"weight": layer.weight, "bias": layer.bias}
    y = torch_transposed(to_torch(params, transposed="weight"), x, 2)
    expected = jnp.moveaxis(layer(jnp.moveaxis(x[0], -1, 0)), 0, -1)
    np.testing.assert_allclose(y[0], expected, rtol=1e-4, atol=1e-4)


@needs_torch
def test_masks_of_transposed_convolutions():
    params = {"up": {"kernel": normal(3, 3, 8, 8), "bias": normal(8)}}
    plan = nmjax.make_plan(params, "2:4", axes={"kernel": -2})
    masks = nmjax.compute_masks(params, plan)
    pruned = to_torch(nmjax.prune(params, plan), transposed="up")
    state = {"up.weight_mask": torch.from_numpy(pruned["up.weight"] != 0)}
    found = masks_from_torch(state, params, plan, transposed="up")
    np.testing.assert_array_equal(found["up/kernel"], masks["up/kernel"])


# Where inputs and outputs have one size, even the axes are unknown.
TRANSPOSED = r"may be a transposed convolution|unknown axes: could be .* a transposed convolution"


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        *((name, outputs) for name in ("up", "deconv", "decoder_up_1") for outputs in (6, 8)),
        ("ConvTranspose_0", 8),
    ],
)
def test_convolutions_that_may_be_transposed(name, outputs):
    params = {name: {"kernel": normal(3, 3, 8, outputs), "bias": normal(outputs)}}
    with pytest.raises(ValueError, match=TRANSPOSED) as error:
        to_torch(params)
    message = str(error.value)
    assert f"{name}/kernel of shape (3, 3, 8, {outputs})" in message
    assert "transposed=" in message
    assert to_torch(params, transposed=name)[f"{name}.weight"].shape == (8, outputs, 3, 3)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("outputs", [6, 8])
@pytest.mark.parametrize("name", ["up", "deconv", "decoder_up_1"])
def test_weights_of_equinox_that_may_be_transposed(name, outputs, use_bias):
    params = {name: {"weight": normal(outputs, 8, 3, 3)}}
    if use_bias:
        params[name]["bias"] = normal(outputs, 1, 1)
    with pytest.raises(ValueError, match="may be a transposed convolution of Equinox") as error:
        to_torch(params)
    message = str(error.value)
    assert f"{name}/weight of shape ({outputs}, 8, 3, 3)" in message
    assert "transposed=" in message
    assert to_torch(params, transposed=name)[f"{name}.weight"].shape == (8, outputs, 3, 3)
    assert to_torch(params, transposed=())[f"{name}.weight"].shape == (outputs, 8, 3, 3)


def test_a_weight_of_pytorch_keeps_its_order():
    """Equinox's biases have an axis for each tap."""
    params = {"up": {"weight": normal(8, 6, 3, 3), "bias": normal(6)}}
    np.testing.assert_array_equal(to_torch(params)["up.weight"], params["up"]["weight"])
    for name, shape in (("conv", (6, 8, 3, 3)), ("up", (6, 8))):
        assert to_torch({name: {"weight": normal(*shape)}})[f"{name}.weight"].shape == shape


@needs_torch
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_the_name_by_flax_and_the_bias_show_a_transposed_convolution(transpose_kernel):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.ConvTranspose(
                6, (3, 2), (2, 2), padding="VALID", transpose_kernel=transpose_kernel
            )
            return layer(x)

    x = normal(2, 5, 5, 8)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), Net().init(jax.random.key(0), x))
    state = to_torch(params)
    weight_and_bias = {name.rpartition(".")[2]: array for name, array in state.items()}
    assert state.keys() == {"ConvTranspose_0.weight", "ConvTranspose_0.bias"}
    y = torch_transposed(weight_and_bias, x, 2)
    np.testing.assert_allclose(y, Net().apply(params, x), rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, from_torch(state, params), params)
    del params["params"]["ConvTranspose_0"]["bias"]
    with pytest.raises(ValueError, match="unknown axes: ambiguous without a bias"):
        to_torch(params)


def test_a_transposed_convolution_alone():
    params = nn.ConvTranspose(6, (3, 3)).init(jax.random.key(0), jnp.ones((1, 4, 4, 8)))["params"]
    with pytest.raises(ValueError, match=TRANSPOSED):
        to_torch(params)


def test_other_names_count_if_the_axes_are_certain():
    params = {"stem": {"kernel": normal(3, 3, 8, 6), "bias": normal(6)}}
    assert to_torch(params)["stem.weight"].shape == (6, 8, 3, 3)
    # PyTorch would load this one as either kind.
    square = {"stem": {"kernel": normal(3, 3, 8, 8), "bias": normal(8)}}
    with pytest.raises(ValueError, match=TRANSPOSED):
        to_torch(square)
    assert to_torch({"conv": square["stem"]})["conv.weight"].shape == (8, 8, 3, 3)


def test_names_by_flax_and_haiku_are_certain():
    params = {"Conv_0": {"kernel": normal(3, 3, 8, 8), "bias": normal(8)}}
    assert to_torch(params).keys() == {"Conv_0.weight", "Conv_0.bias"}
    params = {"net/~/conv2_d_1": {"w": normal(3, 3, 8, 6), "b": normal(6)}}
    assert to_torch(params)["net.~.conv2_d_1.w"].shape == (6, 8, 3, 3)
    params = {"ConvTranspose_0": {"kernel": normal(3, 3, 8, 8), "bias": normal(8)}}
    with pytest.raises(ValueError, match=TRANSPOSED):
        to_torch(params, transposed=())


def test_a_bias_that_contradicts():
    params = {"up": {"kernel": normal(3, 3, 6, 8), "bias": normal(6)}}
    with pytest.raises(ValueError, match="outputs on axis -1 does not fit its bias"):
        to_torch(params, transposed="up")
    assert to_torch(params, transpose_kernel="up")["up.weight"].shape == (8, 6, 3, 3)


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_a_program_that_contradicts(transpose_kernel):
    x = normal(1, 4, 4, 8)
    layer = nn.ConvTranspose(8, (3, 3), transpose_kernel=transpose_kernel)
    params = layer.init(jax.random.key(0), x)["params"]
    plan = nmjax.make_plan(
        params, "2:4", forward=lambda params, x: layer.apply({"params": params}, x), inputs=(x,)
    )
    rules = {"transposed": "kernel", "transpose_kernel": "kernel"}
    right = rules["transpose_kernel"] if transpose_kernel else ()
    state = to_torch(params, plan=plan, transposed="kernel", transpose_kernel=right)
    assert state["weight"].shape == (8, 8, 3, 3)
    del rules["transpose_kernel" if transpose_kernel else "transposed"]
    with pytest.raises(ValueError, match="does not fit its axes"):
        to_torch(params, plan=plan, **rules)
    if transpose_kernel:
        with pytest.raises(ValueError, match="may be a transposed convolution"):
            to_torch(params, plan=plan, transposed=())


def test_rules_that_match_no_kernel():
    params = {"head": {"kernel": normal(8, 4), "bias": normal(4)}}
    for rules in ({"transposed": "head"}, {"transpose_kernel": "up"}, {"axes": {"up": -1}}):
        with pytest.raises(ValueError, match="match no leaf"):
            to_torch(params, **rules)


# Given axes

OUT_IN = {"mlp": {"kernel": normal(12, 8), "bias": normal(12)}}  # As in GPT-2 of Hugging Face.
STACK = {"experts": {"kernel": normal(3, 8, 4)}, "head": {"kernel": normal(8, 4)}}


@pytest.mark.parametrize("given", [-1, (-1,), 1, nmjax.Axes((-1,), (-2,))])
def test_given_axes(given):
    axes = {"mlp/kernel": given}
    state = to_torch(OUT_IN, axes=axes)
    np.testing.assert_array_equal(state["mlp.weight"], OUT_IN["mlp"]["kernel"])
    back = from_torch(state, OUT_IN, axes=axes)
    jax.tree.map(np.testing.assert_array_equal, back, OUT_IN)


def test_axes_of_a_plan(tmp_path):
    plan = nmjax.make_plan(OUT_IN, "2:4", axes={"mlp/kernel": -1})
    state = to_torch(OUT_IN, plan=plan)
    np.testing.assert_array_equal(state["mlp.weight"], OUT_IN["mlp"]["kernel"])
    back = from_torch(state, OUT_IN, plan=plan)
    jax.tree.map(np.testing.assert_array_equal, back, OUT_IN)
    masks = masks_from_torch({"mlp.weight_mask": np.ones((12, 8))}, OUT_IN, plan)
    assert masks["mlp/kernel"].shape == (12, 8)
    pruned = to_torch(nmjax.prune(OUT_IN, plan), plan=plan)
    packed = prune_and_pack(OUT_IN, plan)
    for name, array in to_torch(packed).items():  # A packed leaf contains its plan.
        np.testing.assert_array_equal(array, pruned[name])
    save_torch(tmp_path / "x", OUT_IN, axes={"mlp/kernel": -1})


def test_groups_over_taps_do_not_hide_the_taps():
    params = {"Conv_0": {"kernel": normal(3, 3, 8, 8), "bias": normal(8)}}
    plan = nmjax.make_plan(params, "2:4/kernel")
    for state in (to_torch(params, plan=plan), to_torch(prune_and_pack(params, plan))):
        assert state["Conv_0.weight"].shape == (8, 8, 3, 3)


def test_unknown_kernels_are_listed():
    with pytest.raises(ValueError, match="cannot be converted") as error:
        to_torch(STACK)
    message = str(error.value)
    assert "experts/kernel of shape (3, 8, 4): " in message
    assert "axes=" in message
    assert "head/kernel" not in message
    with pytest.raises(ValueError, match=r"kernel of shape \(3, 8, 4\): may be a stack"):
        to_torch(STACK, axes={"experts": -2})
    line = nmjax.Axes((-2,), (-1,), (-3,))
    state = to_torch(STACK, axes={"experts": line}, transposed=())
    assert state["experts.weight"].shape == (4, 8, 3)


def test_axes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"axes={'mlp/k': -3} does not fit mlp/kernel: .* 2 axes"):
        to_torch(OUT_IN, axes={"mlp/k": -3})
    with pytest.raises(TypeError, match=r"does not fit mlp/kernel"):
        to_torch(OUT_IN, axes={"mlp/k": "in"})


def test_what_is_not_planned_needs_no_axes():
    """Masks exist only for planned leaves."""
    plan = nmjax.make_plan(STACK, "2:4", include="head")
    masks = masks_from_torch({"head.weight_mask": np.ones((4, 8))}, STACK, plan)
    assert masks.keys() == set(plan) < named_leaves(STACK).keys()
