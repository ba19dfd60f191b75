"""Convolutions of each channel by itself, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmjax.kernels.cpu.depthwise import depthwise_conv
from nmjax.kernels.operands import as_window


def xla(x, w, window):
    letters = "HWD"[: w.ndim - 2]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    return jax.lax.conv_general_dilated(
        x,
        w,
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        feature_group_count=x.shape[-1],
        dimension_numbers=numbers,
    )


@given(
    st.integers(1, 2),
    st.lists(st.tuples(st.integers(6, 9), st.integers(1, 3)), min_size=1, max_size=2),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from(["SAME", "VALID", 1, [(0, 2)]]),
)
def test_any_shape(images, axes, channels, stride, dilation, padding):
    spatial, taps = zip(*axes, strict=True)
    padding = padding * len(axes) if isinstance(padding, list) else padding
    window = as_window(spatial, taps, stride, padding, dilation)
    numbers = np.random.default_rng(0)
    x = jnp.asarray(numbers.normal(size=(images, *spatial, channels)), jnp.float32)
    w = jnp.asarray(numbers.normal(size=(*taps, 1, channels)), jnp.float32)
    expected = xla(x, w, window)
    np.testing.assert_allclose(depthwise_conv(x, w, window), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_summed_in_float32(dtype):
    window = as_window((8, 8), (3, 3), 1, "SAME", 1)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4), dtype)
    w = jax.random.normal(jax.random.key(1), (3, 3, 1, 4), dtype)
    y = depthwise_conv(x, w, window)
    exact = xla(x.astype(jnp.float32), w.astype(jnp.float32), window)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, exact.astype(dtype))
