"""Packed weights of integers: their layout bit by bit, rounding, and products by definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmjax
from nmjax.kernels import quantized
from nmjax.kernels.quantized import dequantize, quantize
from nmjax.packed.nm import PackedNM
from tests.nmjax.packed_weights import prune_and_pack

SHAPES = ((8, 1), (16, 5), (40, 3))


@jax.jit
def pack(w):
    params = {"kernel": w}
    return prune_and_pack(params, nmjax.make_plan(params, "2:4"))["kernel"]


def packed_by_hand(w, scales):
    """What the kernel is said to read, one weight after the other: values and codes."""
    inputs, outputs = w.shape
    values = np.zeros((inputs // 4, 2, outputs), np.int8)
    codes = np.zeros((inputs // 8, outputs), np.uint8)
    for output in range(outputs):
        for group in range(inputs // 4):
            entries = w[4 * group : 4 * group + 4, output]
            order = sorted(range(4), key=lambda i: (-abs(entries[i]), i))
            first, second = sorted(order[:2])
            codes[group // 2, output] |= (first | second << 2) << 4 * (group % 2)
            kept = entries[[first, second]]
            values[group, :, output] = np.round(kept / scales[output])
    return values, codes


@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1))
def test_the_layout_bit_by_bit(shape, seed):
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    w[:, 0] = np.round(w[:, 0])  # Ties and zeros.
    made = jax.jit(quantize)(pack(w))
    scales = np.asarray(made.scales)
    values, codes = packed_by_hand(w, scales)
    np.testing.assert_array_equal(made.packed.values, values)
    np.testing.assert_array_equal(made.packed.codes, codes)
    largest = np.abs(w).max(axis=0)  # It is kept in its group.
    np.testing.assert_allclose(scales, np.where(largest, largest / 127, 1), rtol=1e-6)
    assert made.packed.values.dtype == jnp.int8
    assert made.nbytes == values.size + codes.size + 4 * scales.size
    assert made.shape == w.shape


@given(st.integers(0, 2**32 - 1), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_rounding_is_to_the_nearest_step(seed, dtype):
    packed = pack(jnp.asarray(np.random.default_rng(seed).normal(size=(16, 5)), dtype))
    made = jax.jit(quantize)(packed)
    error = np.abs(
        np.asarray(made.packed.values, np.float32) * np.asarray(made.scales)
        - np.asarray(packed.values, np.float32)
    )
    assert (error <= np.asarray(made.scales) * (0.5 + 1e-5)).all()
    assert np.abs(np.asarray(made.packed.values)).max(axis=(0, 1)).tolist() == [127] * 5


@pytest.mark.not_under("jax_debug_nans")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(bad):
    w = np.ones((8, 2), np.float32)
    w[5, 1] = bad
    made = quantize(pack(w))
    y = quantized.matmul(jnp.ones((1, 8)), made)
    assert np.isfinite(y[0, 0])
    assert not np.isfinite(y[0, 1])


def test_an_output_of_zeros_stays_zero():
    made = quantize(pack(np.zeros((8, 2), np.float32)))
    assert made.scales.tolist() == [1, 1]
    assert not np.asarray(made.packed.values).any()


@given(st.integers(0, 2**32 - 1), st.sampled_from([None, "relu"]))
def test_products_by_definition(seed, activation):
    rng = np.random.default_rng(seed)
    made = jax.jit(quantize)(pack(rng.normal(size=(16, 5)).astype(np.float32)))
    x = jnp.asarray(rng.normal(size=(3, 16)), jnp.bfloat16)
    bias = rng.normal(size=5).astype(np.float32)
    y = jax.jit(quantized.matmul, static_argnums=3)(x, made, bias, activation)
    assert y.dtype == jnp.bfloat16
    back = jax.jit(lambda w: PackedNM.unpack(dequantize(w, jnp.dtype(jnp.float32))))(made)
    expected = np.asarray(x, np.float64) @ np.asarray(back, np.float64) + bias
    expected = np.maximum(expected, 0) if activation else expected
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_it_is_a_pytree_and_compiles():
    packed = pack(np.ones((8, 2), np.float32))
    made = jax.jit(quantize)(packed)
    assert len(jax.tree.leaves(made)) == 3
    again = jax.tree.map(lambda a: a, made)
    assert again.packed.leaf_plan == packed.leaf_plan
    np.testing.assert_array_equal(dequantize(again, packed.dtype).values, packed.values)
    stacked = dataclasses.replace(
        packed, values=packed.values[None].repeat(3, 0), codes=packed.codes[None].repeat(3, 0)
    )
    assert quantize(stacked).scales.shape == (3, 2)
