"""Convolutions whose dilated kernel reaches far beyond the image: right, without its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.kernels.operands import as_window

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 9, 7, 8)), jnp.float32)


def packed_kernel(pattern, dtype="float32"):
    params = {"conv": {"kernel": jnp.asarray(RNG.normal(size=(3, 2, 8, 16)), dtype)}}
    plan = nmjax.make_plan(params, pattern)
    return nmjax.pack(nmjax.prune(params, plan), plan)["conv"]["kernel"]


def convolved(x, w, strides, padding, dilation):
    """Each output pixel as a sum over taps, in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    sizes = [
        (x.shape[1 + a] - (w.shape[a] - 1) * dilation[a] - 1) // strides[a] + 1 for a in (0, 1)
    ]
    y = np.zeros((len(x), *sizes, w.shape[-1]))
    for u, v in np.ndindex(*sizes):
        for i, j in np.ndindex(*w.shape[:2]):
            row, column = u * strides[0] + i * dilation[0], v * strides[1] + j * dilation[1]
            y[:, u, v] += x[:, row, column] @ w[i, j]
    return y


@pytest.mark.one_in(3)
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("pattern", ["2:4", "2:4/kernel", "1x4@0.5", "1x4@0.5/layer"])
@pytest.mark.parametrize(
    ("strides", "padding", "dilation"),
    [
        ((1, 1), ((8, 8), (9, 3)), (8, 12)),
        ((2, 3), ((40, 41), (0, 60)), (40, 60)),
        ((1, 1), ((9, 9), (0, 0)), (9, 1)),
    ],
)
def test_against_numpy(implementation, pattern, strides, padding, dilation):
    packed = packed_kernel(pattern)
    y = nmjax.packed_conv(
        X,
        packed,
        jnp.ones(16),
        strides=strides,
        padding=padding,
        dilation=dilation,
        activation="relu",
        implementation=implementation,
    )
    expected = convolved(X, packed.unpack(), strides, padding, dilation) + 1
    np.testing.assert_allclose(y, np.maximum(expected, 0), atol=1e-4)


def test_gradients():
    packed = packed_kernel("1x4@0.5")
    window = {"padding": ((40, 40), (60, 60)), "dilation": (40, 60)}

    def loss(x, values):
        return (nmjax.packed_conv(x, packed.with_values(values), **window) ** 2).sum()

    def dense_loss(x, values):
        w = packed.with_values(values).unpack()
        y = jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            window["padding"],
            rhs_dilation=window["dilation"],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return (y**2).sum()

    got = jax.grad(loss, argnums=(0, 1))(X, packed.values)
    expected = jax.grad(dense_loss, argnums=(0, 1))(X, packed.values)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.optimized
@pytest.mark.parametrize("dilation", [10_000, 2**40])
@pytest.mark.parametrize("pattern", ["2:4", "1x4@0.5"])
def test_no_memory_for_the_gaps(pattern, dilation):
    packed = packed_kernel(pattern)
    conv = jax.jit(lambda x: nmjax.packed_conv(x, packed, dilation=dilation))
    compiled = conv.lower(X).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
    # "SAME" puts 2 taps half a step before and behind the image; of 3, the middle one fits.
    np.testing.assert_array_equal(compiled(X), jnp.zeros((2, 9, 7, 16)))
    one_sided = jax.jit(
        lambda x: nmjax.packed_conv(
            x, packed, dilation=dilation, padding=((dilation, dilation), (0, dilation))
        )
    )
    expected = np.asarray(X, np.float64) @ np.asarray(packed.unpack()[1, 0], np.float64)
    np.testing.assert_allclose(one_sided(X), expected, atol=1e-4)


def test_kernels_asked_for_by_name_refuse():
    with pytest.raises(NotImplementedError, match=r"dilation 100: the kernel reaches far beyond"):
        nmjax.packed_conv(X, packed_kernel("1x4@0.5"), dilation=100, implementation="ffi")


def test_small_dilation_is_no_gap():
    for dilation, wide in ((1, False), (2, False), (8, True)):
        window = as_window((9, 7), (3, 2), 1, "SAME", dilation)
        assert window.has_wide_gaps((9, 7), (3, 2)) == wide
