"""The layers that the image networks share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.images.conv_norm import check_stem, make_conv, make_head, make_norm


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2), (7, 2)])
def test_convolutions_pad_alike_on_all_sides(size, stride):
    layer = make_conv(4, size, stride, name="a")
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 2))
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    assert set(variables["params"]) == {"kernel"}
    out = layer.apply(variables, x)
    kernel, pad = np.asarray(variables["params"]["kernel"]), size // 2
    padded = np.pad(np.asarray(x[0]), ((pad, pad), (pad, pad), (0, 0)))
    at = 2 * stride  # the output at (2, 2)
    expected = np.einsum("hwi,hwio->o", padded[at : at + size, at : at + size], kernel)
    np.testing.assert_allclose(out[0, 2, 2], expected, rtol=1e-4, atol=1e-5)


def test_a_group_for_each_channel_keeps_channels_apart():
    layer = make_conv(3, 3, 1, groups=3, name="a")
    x = jnp.zeros((1, 4, 4, 3)).at[..., 1].set(1.0)
    out = layer.apply(layer.init(jax.random.key(0), x), x)
    assert bool(jnp.any(out[..., 1]))
    assert not bool(jnp.any(out[..., ::2]))


@pytest.mark.parametrize("zero", [False, True])
def test_normalization_starts_at_one_or_at_zero(zero):
    layer = make_norm(True, name="a", zero=zero)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.ones((2, 3)))["params"]
    np.testing.assert_array_equal(params["scale"], np.full(3, 0.0 if zero else 1.0))


def test_the_head_is_named_and_starts_within_one_over_the_root_of_its_inputs():
    layer = make_head(10)
    kernel = jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 64)))["params"]["kernel"]
    assert layer.name == "head"
    assert 0.9 / 8 < np.abs(kernel).max() <= 1 / 8


def test_unknown_stems_are_refused():
    check_stem("cifar")
    with pytest.raises(ValueError, match="'imagenet' or 'cifar', got 'patch'"):
        check_stem("patch")
