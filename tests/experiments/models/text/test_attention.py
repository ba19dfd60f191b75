"""Attention against Flax's own, its masks, and positions against the paper's formula."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.text.attention import Attention, causal_mask, padding_mask, sinusoids

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 8)).astype(np.float32)
MEMORY = RNG.standard_normal((2, 7, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def flaxs():
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    return module, jax.jit(module.init)(jax.random.key(0), X, MEMORY)


@jax.jit
def attend(variables, mask):
    module = Attention(8, 2)
    memory = module.apply(variables, MEMORY, method="keys_values")
    return module.apply(variables, X, memory, mask)


def test_it_is_flaxs_with_the_same_parameters(flaxs):
    module, variables = flaxs
    for share in (1.0, 0.7):
        mask = RNG.random((2, 1, 5, 7)) < share
        expected = jax.jit(module.apply)(variables, X, MEMORY, mask=mask)
        np.testing.assert_allclose(attend(variables, mask), expected, atol=1e-5)


def test_masks():
    np.testing.assert_array_equal(causal_mask(3)[0, 0], [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    tokens = jnp.array([[5, 6, 0], [7, 0, 0]])
    np.testing.assert_array_equal(padding_mask(tokens, 0)[:, 0, 0], [[1, 1, 0], [1, 0, 0]])


def test_a_query_that_sees_nothing_stays_finite(flaxs):
    assert jnp.isfinite(attend(flaxs[1], np.zeros((2, 1, 5, 7), bool))).all()


def test_positions_are_the_papers_up_to_the_order_of_channels():
    length, width = 11, 6
    expected = np.zeros((length, width))
    for position in range(length):
        for i in range(width // 2):
            angle = position / 10_000 ** (2 * i / width)
            expected[position, 2 * i], expected[position, 2 * i + 1] = np.sin(angle), np.cos(angle)
    order = [0, 2, 4, 1, 3, 5]
    np.testing.assert_allclose(sinusoids(length, width), expected[:, order], atol=1e-6)
