"""Integers in the order of floats, and the n highest along one axis or several."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmjax.masks.ranking import keep_highest, magnitude_keys, signed_keys

# In order; what is on one line is equal.
ORDERED = [
    [-np.inf],
    [-2.0],
    [-1e-40],  # A denormal: CPUs may flush it to zero, its bits say more.
    [-0.0, 0.0],
    [1e-40],
    [1.0],
    [np.inf],
]
if not jax.config.jax_debug_nans:
    ORDERED.append([np.nan, -np.nan])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_order_as_values_do(dtype):
    rank = [i for i, equal in enumerate(ORDERED) for _ in equal]
    values = jnp.asarray(np.array([x for equal in ORDERED for x in equal], np.float32)).astype(
        dtype
    )
    keys = np.asarray(signed_keys(values))
    for a in range(len(rank)):
        for b in range(len(rank)):
            assert (keys[a] < keys[b]) == (rank[a] < rank[b])
    np.testing.assert_array_equal(magnitude_keys(values)[:3], magnitude_keys(-values)[:3])


def by_sorting(values, n, axes):
    """The same rule by a stable sort, over the axes moved behind the others."""
    others = [a for a in range(values.ndim) if a not in axes]
    rows = values.transpose(others + list(axes))
    flat = rows.reshape(-1, int(np.prod([values.shape[a] for a in axes])))
    kept = np.zeros(flat.shape, bool)
    for row, flags in zip(flat, kept, strict=True):
        flags[np.argsort(-row, kind="stable")[:n]] = True
    return kept.reshape(rows.shape).transpose(np.argsort(others + list(axes)))


@given(st.data())
def test_keeps_what_sorting_keeps(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axes = data.draw(st.permutations(range(len(shape))))
    axes = tuple(axes[: data.draw(st.integers(1, len(shape)))])
    size = int(np.prod([shape[a] for a in axes]))
    n = data.draw(st.integers(0, size))
    seed = data.draw(st.integers(0, 2**32 - 1))
    values = np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)
    expected = by_sorting(values, n, axes)
    keep = jax.jit(functools.partial(keep_highest, to_keys=signed_keys, axes=axes))
    np.testing.assert_array_equal(keep(values, n=n), expected)
    assert keep(values, n=size).all()


def test_one_axis_needs_no_tuple():
    values = np.random.default_rng(0).integers(-2, 3, (3, 4)).astype(np.float32)
    kept = keep_highest(jnp.asarray(values), signed_keys, 2, 1)
    np.testing.assert_array_equal(kept, by_sorting(values, 2, (1,)))


def test_how_many_stay_may_differ_from_call_to_call_without_compiling():
    values = jax.random.normal(jax.random.key(0), (3, 17))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def keep(n):
        return keep_highest(values, signed_keys, n, 1)

    for n in range(18):
        np.testing.assert_array_equal(keep(n), by_sorting(np.asarray(values), n, (1,)))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_nothing_to_keep(shape):
    assert keep_highest(jnp.zeros(shape), signed_keys, 0, 1).shape == shape
