"""Products that layers call, with packed weights, against XLA's on the unpacked ones."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nmjax
from nmjax.kernels import layer_products
from nmjax.kernels.layer_products import (
    packed_conv_general,
    packed_dot_general,
    packed_einsum,
    summed_axes,
)

PATTERNS = ["2:4", "1x4@0.5"]


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def packed_weight(shape, axes, pattern):
    params = {"w": normal(shape)}
    plan = nmjax.make_plan(params, pattern, axes={"w": axes})
    return nmjax.pack(nmjax.prune(params, plan), plan)["w"]


@pytest.fixture
def counted(monkeypatch):
    """Counts the products that do not unpack."""
    calls = []

    def count(name):
        product = getattr(layer_products, name)

        def counting(*args, **kwargs):
            calls.append(name)
            return product(*args, **kwargs)

        monkeypatch.setattr(layer_products, name, counting)

    count("packed_matmul")
    count("packed_conv")
    return calls


# Shapes of x and w, dimension numbers, the plan's axes, and whether the packed form is used.
DOTS = {
    "last": ((3, 8), (8, 4), (((1,), (0,)), ((), ())), nmjax.Axes(-2, -1), True),
    "first": ((8, 3), (8, 4), (((0,), (0,)), ((), ())), nmjax.Axes(-2, -1), True),
    "transposed": ((3, 8), (4, 8), (((1,), (1,)), ((), ())), nmjax.Axes(-1, -2), True),
    "two": ((2, 3, 4, 8), (2, 8, 4), (((0, 3), (0, 1)), ((), ())), nmjax.Axes((-3, -2), -1), True),
    "two_swapped": (
        (2, 3, 4, 8),
        (8, 2, 4),
        (((0, 3), (1, 0)), ((), ())),
        nmjax.Axes((-3, -2), -1),
        True,
    ),
    "outputs": ((3, 8), (8, 2, 4), (((1,), (0,)), ((), ())), nmjax.Axes(-3, (-2, -1)), True),
    "batch": ((5, 3, 8), (5, 8, 4), (((2,), (1,)), ((0,), (0,))), nmjax.Axes(-2, -1), True),
    "batches": (
        (3, 2, 5, 8),
        (5, 2, 8, 4),
        (((3,), (2,)), ((2, 1), (0, 1))),
        nmjax.Axes(-2, -1),
        True,
    ),
    "other_axes": ((3, 8), (8, 4), (((1,), (0,)), ((), ())), nmjax.Axes(-1, -2), False),
    "batch_behind": ((5, 3, 8), (8, 5, 4), (((2,), (0,)), ((0,), (1,))), nmjax.Axes(-3, -1), False),
    "batch_of_out": (
        (4, 3, 8),
        (8, 4),
        (((2,), (0,)), ((0,), (1,))),
        nmjax.Axes(-2, -1),
        False,
    ),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", DOTS)
def test_dot_general(name, pattern, counted):
    x_shape, w_shape, dimension_numbers, axes, is_fast = DOTS[name]
    x, packed = normal(x_shape, 1), packed_weight(w_shape, axes, pattern)
    expected = lax.dot_general(x, packed.unpack(), dimension_numbers)
    got = packed_dot_general(x, packed, dimension_numbers)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert bool(counted) == is_fast


# The equation, shapes of x and w, the plan's axes, and whether the packed form is used.
EINSUMS = [
    ("bi,io->bo", (3, 8), (8, 4), nmjax.Axes(-2, -1), True),
    ("bi,oi->ob", (3, 8), (4, 8), nmjax.Axes(-1, -2), True),
    ("...i,io->...o", (2, 3, 8), (8, 4), nmjax.Axes(-2, -1), True),
    ("i...,io->o...", (8, 3, 2), (8, 4), nmjax.Axes(-2, -1), True),
    ("...i,io->...o", (8,), (8, 4), nmjax.Axes(-2, -1), True),
    ("btd,dnh->bnth", (2, 3, 8), (8, 2, 4), nmjax.Axes(-3, (-2, -1)), True),
    ("btnh,nhd->btd", (2, 3, 2, 4), (2, 4, 8), nmjax.Axes((-3, -2), -1), True),
    ("ebi,eio->beo", (5, 3, 8), (5, 8, 4), nmjax.Axes(-2, -1), True),
    ("b t d , d f -> t f b", (2, 3, 8), (8, 4), nmjax.Axes(-2, -1), True),
    ("abi,io->ao", (2, 3, 8), (8, 4), nmjax.Axes(-2, -1), False),  # sums x over b
    ("bi,io->b", (3, 8), (8, 4), nmjax.Axes(-2, -1), False),  # sums w over o
    ("bii,io->bo", (3, 8, 8), (8, 4), nmjax.Axes(-2, -1), False),  # a diagonal
    ("ei,...io->e...o", (3, 8), (5, 8, 4), nmjax.Axes(-2, -1), False),
    ("bi,io->bo", (3, 1), (8, 4), nmjax.Axes(-2, -1), False),  # repeats x
    ("ebi,eio->beo", (1, 3, 8), (5, 8, 4), nmjax.Axes(-2, -1), False),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("case", EINSUMS, ids=lambda case: f"{case[0]}{case[1]}")
def test_einsum(case, pattern, counted):
    subscripts, x_shape, w_shape, axes, is_fast = case
    x, packed = normal(x_shape, 1), packed_weight(w_shape, axes, pattern)
    expected = jnp.einsum(subscripts, x, packed.unpack())
    np.testing.assert_allclose(packed_einsum(subscripts, x, packed), expected, rtol=1e-5, atol=1e-5)
    assert bool(counted) == is_fast


@pytest.mark.parametrize("shape", [(3, 4), (3,), (3, 8, 2)])
def test_einsum_has_the_errors_of_jax(shape):
    x, packed = normal(shape), packed_weight((8, 4), -2, "2:4")
    for weight, einsum in ((packed.unpack(), jnp.einsum), (packed, packed_einsum)):
        with pytest.raises(ValueError, match=r"Size of label|correct number of indices"):
            einsum("bi,io->bo", x, weight)


def test_summed_axes():
    assert summed_axes("btnh, nhd -> btd") == (-3, -2)
    assert summed_axes("...i,oi->...o") == (-1,)
    assert summed_axes("ebi,eio->ebo") == (-2,)


CONVOLUTIONS = {
    "same": ({}, True),
    "strided": ({"window_strides": (2, 1), "padding": "VALID"}, True),
    "dilated": ({"rhs_dilation": (2, 2)}, True),
    "padded": ({"padding": [(1, 0), (0, 2)]}, True),
    "input_dilated": ({"lhs_dilation": (2, 2), "padding": [(1, 1), (1, 1)]}, False),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("pattern", [*PATTERNS, "2:4/kernel"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_general(name, pattern, counted):
    settings, is_fast = CONVOLUTIONS[name]
    settings = {"window_strides": (1, 1), "padding": "SAME", **settings}
    settings["dimension_numbers"] = ("NHWC", "HWIO", "NHWC")
    x = normal((2, 6, 6, 8), 1)
    packed = packed_weight((3, 3, 8, 4), nmjax.Axes(-2, -1, (-4, -3)), pattern)
    expected = lax.conv_general_dilated(x, packed.unpack(), **settings)
    strides, padding = settings.pop("window_strides"), settings.pop("padding")
    got = packed_conv_general(x, packed, strides, padding, **settings)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert bool(counted) == is_fast


KERNEL_AXES = nmjax.Axes(-2, -1, (-4, -3))
# The plan's axes, the shapes of image and kernel, and the dimension numbers.
UNPACKED_CONVOLUTIONS = {
    "swapped_channels": (nmjax.Axes(-1, -2, (-4, -3)), (2, 6, 5, 8), ("NHWC", "HWIO", "NHWC")),
    "swapped_taps": (nmjax.Axes(-2, -1, (-3, -4)), (2, 6, 5, 8), ("NHWC", "HWIO", "NHWC")),
    "channels_first": (KERNEL_AXES, (2, 8, 6, 5), ("NCHW", "HWIO", "NCHW")),
    "channels_first_result": (KERNEL_AXES, (2, 6, 5, 8), ("NHWC", "HWIO", "NCHW")),
    "swapped_kernel": (KERNEL_AXES, (2, 6, 5, 8), ("NHWC", "HWOI", "NHWC")),
    "swapped_image": (KERNEL_AXES, (2, 6, 5, 8), ("NWHC", "HWIO", "NWHC")),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("pattern", [*PATTERNS, "2:4/kernel"])
@pytest.mark.parametrize("name", UNPACKED_CONVOLUTIONS)
def test_conv_general_along_other_axes(name, pattern, counted):
    axes, x_shape, dimension_numbers = UNPACKED_CONVOLUTIONS[name]
    x, packed = normal(x_shape, 1), packed_weight((3, 3, 8, 8), axes, pattern)
    settings = {"dimension_numbers": dimension_numbers}
    expected = lax.conv_general_dilated(x, packed.unpack(), (1, 1), "SAME", **settings)
    got = packed_conv_general(x, packed, (1, 1), "SAME", **settings)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert not counted


def test_conv_general_has_the_default_axes_of_lax():
    x, packed = normal((2, 8, 6, 6), 1), packed_weight((8, 8, 3, 3), -3, "2:4")
    expected = lax.conv_general_dilated(x, packed.unpack(), (1, 1), "SAME")
    got = packed_conv_general(x, packed, (1, 1), "SAME")
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preferred", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_of_results(dtype, preferred):
    x, packed = normal((3, 64), 1).astype(dtype), packed_weight((64, 4), -2, "2:4")
    packed = packed.with_values(packed.values.astype(dtype))
    dimension_numbers = ((1,), (0,)), ((), ())
    settings = {"preferred_element_type": preferred}
    expected = lax.dot_general(x, packed.unpack(), dimension_numbers, **settings)
    got = packed_dot_general(x, packed, dimension_numbers, **settings)
    assert got.dtype == expected.dtype
    # A result in float32 must not have been rounded to bfloat16 before.
    rtol = 1e-2 if expected.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(got.astype(float), expected.astype(float), rtol=rtol, atol=rtol)
