"""Strings of bits, exact counts, and numbers as bits: against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmjax.packed.bits import (
    as_bits,
    check_dtype,
    exactly,
    from_bits,
    index_dtype,
    nan_bits,
    pack_bits,
    unpack_bits,
)
from tests.nmjax.float_bits import DTYPES, any_bits, bits_of


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_as_bits_and_back(dtype):
    w = any_bits(np.random.default_rng(0), (1000,), dtype)
    bits = as_bits(w)
    np.testing.assert_array_equal(bits, bits_of(w))
    np.testing.assert_array_equal(bits_of(from_bits(bits, w.dtype)), bits_of(w))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("float4_e2m1fn", "whole bytes, got float4_e2m1fn, whose numbers have 4 bits"),
        ("float8_e8m0fnu", "a zero, got float8_e8m0fnu"),
        ("int32", "floating, got int32"),
        ("complex64", "floating, got complex64"),
    ],
)
def test_dtypes_that_packed_weights_cannot_have(dtype, words):
    with pytest.raises(TypeError, match=words):
        check_dtype(jnp.dtype(dtype), "the weights")


@pytest.mark.not_under("jax_debug_nans")
@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e4m3fn", "float8_e5m2fnuz", "float8_e3m4"])
def test_nan_by_its_bits(dtype):
    check_dtype(jnp.dtype(dtype), "the weights")
    assert jnp.isnan(from_bits(jnp.asarray(nan_bits(jnp.dtype(dtype))), jnp.dtype(dtype)))


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_index_dtype(bits):
    assert index_dtype(2**bits) == f"uint{bits}"
    assert index_dtype(2**bits + 1) == f"uint{2 * bits}"
    assert index_dtype(0) == index_dtype(1) == "uint8"


@given(st.integers(0, 17), st.integers(0, 20), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_strings_of_bits(width, count, lanes, seed):
    x = np.random.default_rng(seed).integers(0, 2**width, (2, count, lanes))
    x = x.astype(index_dtype(2**width))
    packed = jax.jit(pack_bits, static_argnums=1)(x, width)
    assert packed.shape == (2, -(-width * count // 8), lanes)
    for stack, lane in np.ndindex(2, lanes):
        number = sum(int(v) << width * i for i, v in enumerate(x[stack, :, lane]))
        assert int.from_bytes(np.asarray(packed)[stack, :, lane].tobytes(), "little") == number
    on_device = jax.jit(unpack_bits, static_argnums=(1, 2))
    for unpacked in (
        on_device(packed, width, count),
        unpack_bits(np.asarray(packed), width, count, np),
    ):
        assert unpacked.dtype == x.dtype
        np.testing.assert_array_equal(unpacked, x)


def test_booleans_are_bits():
    flags = jnp.array([[True], [False], [True]])
    assert pack_bits(flags, 1).tolist() == [[0b101]]


keep_exactly = jax.jit(lambda flags, n: exactly(flags, n, axis=0))


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_exactly(flags, data):
    n = data.draw(st.integers(0, len(flags)))
    order = sorted(range(len(flags)), key=lambda i: (not flags[i], i))[:n]
    expected = [i in order for i in range(len(flags))]
    assert keep_exactly(np.array(flags), n).tolist() == expected
