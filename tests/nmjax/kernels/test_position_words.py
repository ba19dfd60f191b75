"""The words of Hopper's sparse instruction, read thread by thread as the PTX ISA describes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmjax
from nmjax.kernels.position_words import position_words
from nmjax.packed_nm import pack_nm


def sparse_wgmma(a, b, words, selector):
    """What m64nNk32 adds: a (64, 16) kept values, b (32, n), the words of 128 threads.

    Of each four threads, the selector names the first two or the last two. The first of the pair
    has columns 0 to 15 of a row, the other those from 16 on: bits 0 to 15 of row lane // 4 of its
    warp's 16 rows, bits 16 to 31 of the row 8 below; 2 bits for each value, groups in order.
    """
    dense = np.zeros((64, 32))
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        if lane % 4 // 2 != selector:
            continue
        for bit in range(0, 32, 2):
            row = 16 * warp + lane // 4 + 8 * (bit // 16)
            value = 8 * (lane % 2) + bit % 16 // 2
            place = (int(words[thread]) >> bit) & 3
            column = 4 * (value // 2) + place
            assert dense[row, column] == 0  # The same place twice would be undefined.
            dense[row, column] = a[row, value]
    return dense @ b


def product(x, packed):
    """X @ W by the instruction: all sizes, none of them in a hurry."""
    words = np.asarray(position_words(packed))
    values = np.asarray(packed.values, np.float64).reshape(-1, packed.shape[1])
    y = np.zeros((packed.shape[1], x.shape[0]))
    for span in range(packed.shape[0] // 64):
        for tile in range(packed.shape[1] // 64):
            for half in range(2):
                first = 64 * span + 32 * half
                outputs = slice(64 * tile, 64 * (tile + 1))
                a = values[first // 2 : first // 2 + 16, outputs].T
                y[outputs] += sparse_wgmma(a, x[:, first : first + 32].T, words[span, tile], half)
    return y.T


def packed_weight(seed, shape, dtype=jnp.bfloat16):
    """A 2:4 weight of small integers, none zero, of which any two of four are kept."""
    random = np.random.default_rng(seed)
    order = random.random((shape[0] // 4, 4, shape[1])).argsort(axis=1)
    mask = (order < 2).reshape(shape)
    w = jnp.asarray(random.integers(1, 9, shape) * random.choice([-1, 1], shape), dtype)
    plan = nmjax.make_plan({"kernel": w}, "2:4")["kernel"]
    return pack_nm(w, jnp.asarray(mask), plan)


@given(
    seed=st.integers(0, 2**32 - 1),
    spans=st.integers(1, 3),
    tiles=st.integers(1, 2),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16]),
)
def test_the_instruction_multiplies_by_the_weight(seed, spans, tiles, dtype):
    packed = packed_weight(seed, (64 * spans, 128 * tiles), dtype)
    x = np.random.default_rng(seed).integers(-8, 9, (8, 64 * spans)).astype(np.float64)
    w = np.asarray(nmjax.unpack({"kernel": packed})["kernel"], np.float64)
    assert np.array_equal(product(x, packed), x @ w)  # Integers: no sum is rounded.


def test_one_group_is_where_it_should_be():
    mask = np.tile(np.array([True, True, False, False])[:, None], (16, 128))
    mask[20:24, 43] = [False, False, True, True]
    w = jnp.ones((64, 128), jnp.bfloat16)
    plan = nmjax.make_plan({"kernel": w}, "2:4")["kernel"]
    words = np.array(position_words(pack_nm(w, jnp.asarray(mask), plan)))
    # Warp 2, row 3 of it in the upper half, inputs 16 to 31, the second group there.
    assert words[0, 0, 64 + 4 * 3 + 1] == 0x44E44444
    words[0, 0, 64 + 4 * 3 + 1] = 0x44444444
    assert (words == 0x44444444).all()


def test_groups_of_fewer_are_valid_too():
    w = jnp.zeros((64, 128), jnp.bfloat16).at[7].set(3)
    packed = nmjax.pack({"kernel": w}, nmjax.make_plan({"kernel": w}, "2:4"))["kernel"]
    assert np.array_equal(product(np.eye(64)[:8], packed), np.asarray(w, float)[:8])


@pytest.mark.parametrize(
    ("pattern", "shape", "dtype", "words"),
    [
        ("1:4", (64, 128), jnp.bfloat16, "2:4 weights, not 1:4"),
        ("1x4@0.5", (64, 128), jnp.bfloat16, "not 1x4@0.5"),
        ("2:4", (3, 3, 64, 128), jnp.bfloat16, "one matrix"),
        ("2:4", (64, 128), jnp.float32, "bfloat16 or float16; cast"),
        ("2:4", (32, 128), jnp.bfloat16, "inputs in multiples of 64"),
        ("2:4", (64, 64), jnp.bfloat16, "outputs in multiples of 128"),
    ],
)
def test_what_it_does_not_take_is_said(pattern, shape, dtype, words):
    params = {"kernel": jnp.ones(shape, dtype)}
    packed = nmjax.pack(params, nmjax.make_plan(params, pattern))["kernel"]
    with pytest.raises(ValueError, match=words):
        position_words(packed)


def test_nothing_is_computed_but_an_order():
    packed = packed_weight(0, (128, 128))
    words = jax.jit(position_words)(packed)
    assert words.shape == (2, 2, 128)
    assert sorted(np.asarray(words).tobytes()) == sorted(np.asarray(packed.codes).tobytes())
