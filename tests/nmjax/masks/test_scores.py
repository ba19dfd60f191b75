"""Scores of blocks against brute force in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmjax.masks import scores


def bpar_by_hand(blocks, alpha=1.0):
    """Block by block and pair by pair, as the paper's code defines it."""
    blocks = np.asarray(blocks, np.float64)
    result = np.empty(blocks.shape[:-1])
    for row in np.ndindex(blocks.shape[:-2]):
        size, redundancy = [], []
        for block in blocks[row]:
            size.append(sum(abs(weight) for weight in block))
            similar = 0.0
            for other in blocks[row]:
                norms = np.linalg.norm(block) * np.linalg.norm(other)
                similar += abs(block @ other) / norms if norms else 0.0
            redundancy.append(similar)
        for c in range(len(size)):
            part = redundancy[c] / sum(redundancy) if redundancy[c] else 1.0
            result[(*row, c)] = (size[c] / sum(size) if any(size) else 0.0) - alpha * part
    return result


def random_blocks(seed, shape, zeros=0.3):
    rng = np.random.default_rng(seed)
    blocks = rng.standard_normal(shape) * rng.exponential(size=shape[:-1])[..., None]
    blocks[rng.random(shape[:-1]) < zeros] = 0
    return jnp.asarray(blocks, jnp.float32)


shapes = st.tuples(*(st.integers(1, high) for high in (2, 3, 7, 5)))


@given(st.integers(0, 2**32 - 1), shapes, st.sampled_from([0.5, 1.0, 2.0]))
def test_angular_redundancy_equals_brute_force(seed, shape, alpha):
    blocks = random_blocks(seed, shape)
    np.testing.assert_allclose(
        jax.jit(scores.block_angular_redundancy)(blocks, alpha),
        bpar_by_hand(blocks, alpha),
        atol=2e-6,
    )


def test_blocks_of_zeros_rank_last():
    blocks = random_blocks(0, (3, 40, 8))
    value = np.asarray(scores.block_angular_redundancy(blocks))
    zero = ~np.asarray(blocks).any(axis=-1)
    assert zero.any()
    assert (value[zero] == -1).all()
    assert (value[~zero] > -1).all()


def test_a_row_of_zeros_only():
    value = scores.block_angular_redundancy(jnp.zeros((2, 4, 8)))
    np.testing.assert_array_equal(value, -np.ones((2, 4)))


def test_of_equally_large_blocks_the_one_like_no_other_scores_highest():
    blocks = jnp.array([[[1.0, 0, 0], [-1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1.0]]])
    assert scores.block_angular_redundancy(blocks).argmax() == 3


def test_the_size_of_a_block_does_not_change_angles():
    blocks = random_blocks(1, (2, 6, 8), zeros=0)
    factors = jnp.linspace(0.5, 2, 6)[None, :, None]
    difference = scores.block_angular_redundancy(blocks, 1.0) - scores.block_angular_redundancy(
        blocks, 0.0
    )
    scaled = blocks * factors
    again = scores.block_angular_redundancy(scaled, 1.0) - scores.block_angular_redundancy(
        scaled, 0.0
    )
    np.testing.assert_allclose(difference, again, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 50, 2**23])
def test_rows_are_worked_on_a_few_at_a_time(monkeypatch, limit):
    monkeypatch.setattr(scores, "_SIMILARITIES", limit)
    blocks = random_blocks(2, (5, 6, 4))
    np.testing.assert_allclose(
        scores.block_angular_redundancy(blocks), bpar_by_hand(blocks), atol=2e-6
    )


@pytest.mark.optimized
def test_similarities_of_all_rows_are_never_held_at_once():
    rows, inputs, size = 64, 512, 16
    shape = jax.ShapeDtypeStruct((rows, inputs, size), jnp.float32)
    compiled = jax.jit(scores.block_angular_redundancy).lower(shape).compile()
    all_at_once = rows * inputs**2 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < all_at_once


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_norms(dtype):
    blocks = random_blocks(3, (2, 5, 300)).astype(dtype)
    exact = np.asarray(blocks, np.float64)
    for score, norm in ((scores.block_l1, 1), (scores.block_l2, 2)):
        value = score(blocks)
        assert value.dtype == jnp.float32  # Sums of 300 in half precision would be off.
        np.testing.assert_allclose(value, np.linalg.norm(exact, norm, axis=-1), rtol=1e-5)


def test_scores_by_name():
    assert scores.block_score("bpar") is scores.block_angular_redundancy
    assert scores.block_score(scores.block_l2) is scores.block_l2
    with pytest.raises(
        ValueError, match="unknown block score 'l3'; the known scores are l1, l2, bpar"
    ):
        scores.block_score("l3")
    with pytest.raises(TypeError, match="must be a name or a function, got 1"):
        scores.block_score(1)
