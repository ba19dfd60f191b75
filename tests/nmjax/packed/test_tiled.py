"""The layout of packed weights for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from tests.nmjax.packed_weights import prune_and_pack


def tree(pattern, dtype=jnp.bfloat16):
    key = jax.random.key(0)
    params = {
        "stack": {"kernel": jax.random.normal(key, (2, 192, 40)).astype(dtype)},
        "layer": {"kernel": jax.random.normal(key, (192, 5)).astype(dtype), "bias": jnp.ones(5)},
    }
    axes = {"stack": nmjax.Axes((-2,), (-1,))}
    return prune_and_pack(params, nmjax.make_plan(params, pattern, axes=axes))


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "4:8", "3:6", "2:2", "2:4/16"])
def test_both_ways_are_exact(pattern):
    packed = tree(pattern)
    tiled = jax.jit(nmjax.for_platform)(packed)
    for leaf in (tiled["stack"]["kernel"], tiled["layer"]["kernel"]):
        assert isinstance(leaf, nmjax.TiledNM)
        leaf.check_arrays()
        leaf.check()
    assert_same(nmjax.for_platform(tiled, "cpu"), packed)
    assert_same(nmjax.for_platform(tiled, "tpu"), tiled)
    assert_same(nmjax.unpack(tiled), nmjax.unpack(packed))


def test_words_hold_the_codes_of_neighboring_groups():
    """The layout by its definition, one group at a time."""
    params = {"kernel": jax.random.normal(jax.random.key(1), (512, 3)).astype(jnp.bfloat16)}
    packed = prune_and_pack(params, nmjax.make_plan(params, "1:4"))["kernel"]
    tiled, positions = nmjax.for_platform(packed), np.asarray(packed.positions())
    words = np.asarray(tiled.codes).view(np.uint32)
    for group in range(128):
        # Two groups share a word, eight words a register, eight shifts of two bits a lane.
        word, half = divmod(group, 2)
        shift, row = divmod(word, 8)
        found = words[row] >> (16 * half + 2 * shift) & 3
        np.testing.assert_array_equal(found, positions[group, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_what_has_no_layout_stays_as_it_is(dtype):
    packed = tree("2:4", dtype)
    assert_same(nmjax.for_platform(packed), packed)


def test_files_store_what_pack_makes(tmp_path):
    packed = tree("2:4")
    nmjax.save_packed(tmp_path / "a.safetensors", nmjax.for_platform(packed))
    assert_same(nmjax.load_packed(tmp_path / "a.safetensors", like=packed), packed)


def test_damaged_arrays_are_refused():
    leaf = nmjax.for_platform(tree("2:4"))["layer"]["kernel"]
    with pytest.raises(TypeError, match=r"codes.*int32"):
        jax.tree.map(lambda a: a.astype(jnp.bfloat16), leaf).unpack()
    with pytest.raises(ValueError, match=r"values of shape .* cannot hold"):
        leaf.with_values(leaf.values[:, :-1]).unpack()
    with pytest.raises(ValueError, match='"cpu", "gpu" or "tpu"'):
        nmjax.for_platform(leaf, "npu")
