"""Packed masks and checksums, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.checkpointing.stored_state import (
    checksums,
    from_stored,
    packing_axis,
    split_alike,
    to_stored,
)

RNG = np.random.default_rng(0)


def sum_by_hand(leaf):
    """In Python's integers."""
    bits = leaf.view(f"u{leaf.itemsize}") if leaf.dtype != bool else leaf
    return sum(int(word) * (2 * place + 1) for place, word in enumerate(bits.ravel())) % 2**32


@settings(max_examples=8)
@given(
    st.lists(st.integers(1, 17), max_size=3),
    st.sampled_from([bool, np.float32, np.int32, np.uint8, np.float16]),
)
def test_a_state_comes_back_and_its_sums_are_as_by_hand(shape, dtype):
    leaf = np.asarray(RNG.standard_normal(shape) > 0 if dtype is bool else 9 * RNG.random(shape))
    state = {"leaf": leaf.astype(dtype)}
    stored = jax.device_get(to_stored(jax.tree.map(jnp.asarray, state)))
    assert stored["checksums"].tolist() == [sum_by_hand(np.asarray(stored["state"]["leaf"]))]
    if dtype is bool and shape:
        axis = packing_axis(tuple(shape))
        expected = np.packbits(state["leaf"], axis=axis, bitorder="little")
        np.testing.assert_array_equal(stored["state"]["leaf"], expected)
    back = from_stored(stored["state"], jax.eval_shape(lambda: state))
    np.testing.assert_array_equal(back["leaf"], state["leaf"])
    assert back["leaf"].dtype == dtype


def test_masks_are_packed_along_an_axis_that_8_divides():
    assert packing_axis((3, 3, 16, 10)) == 2
    assert packing_axis((8, 16)) == 1
    assert packing_axis((5, 3)) == 1
    stored = to_stored({"mask": jnp.ones((3, 3, 16, 10), bool)})
    assert stored["state"]["mask"].shape == (3, 3, 2, 10)


@pytest.mark.parametrize("change", [1, 128, 2**31])
def test_every_change_of_one_entry_changes_the_sum(change):
    words = RNG.integers(0, 2**32, 64, dtype=np.uint32)
    before = checksums([jnp.asarray(words)])
    for place in range(64):
        changed = words.copy()
        changed[place] ^= np.uint32(change)
        assert checksums([jnp.asarray(changed)]) != before


def test_two_entries_that_change_places_change_the_sum():
    assert checksums([jnp.array([1.0, 2.0, 3.0])]) != checksums([jnp.array([1.0, 3.0, 2.0])])


def test_the_sum_does_not_depend_on_how_arrays_are_split():
    mesh = jax.make_mesh((4, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    whole = jnp.asarray(RNG.standard_normal((8, 16)), jnp.float32)
    split = jax.device_put(whole, NamedSharding(mesh, P("a", "b")))
    assert checksums([whole]) == jax.jit(checksums)([split])


def test_packed_masks_are_split_as_masks_where_they_can_be():
    mesh = jax.make_mesh((4, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)

    def spec(sharded, shape, packed):
        leaf = jax.ShapeDtypeStruct(shape, bool, sharding=NamedSharding(mesh, sharded))
        alike = split_alike(jax.ShapeDtypeStruct(packed, jnp.uint8), leaf)
        assert (alike.shape, alike.dtype) == (packed, jnp.uint8)
        return alike.sharding.spec

    assert spec(P("a", "b"), (8, 16), (8, 2)) == P("a", "b")
    assert spec(P("b", "a"), (8, 16), (8, 2)) == P("b", None)
    assert spec(P("a"), (8, 16), (8, 2)) == P("a")
