"""Sizes of packed trees, against bytes counted by hand, and the table that shows them."""

import math

import jax
import jax.numpy as jnp
import pytest

import nmjax
from nmjax import LeafSize, sizes
from tests.nmjax.packed_weights import prune_and_pack

PARAMS = {
    "a": {"kernel": jnp.ones((128, 64), jnp.bfloat16), "bias": jnp.zeros(64, jnp.float32)},
    "b": {"kernel": jnp.ones((1000, 32), jnp.float32)},
}
PLAN = nmjax.make_plan(PARAMS, "2:4", rules={"b/": "1x16@0.9"})
PACKED = prune_and_pack(PARAMS, PLAN)


def test_sizes_by_hand():
    table = sizes(PACKED)
    groups = 32 * 64
    least_a = groups * 2 * 2 + math.ceil(groups * math.log2(6) / 8)
    least_b = 200 * 16 * 4 + math.ceil(2 * math.log2(math.comb(1000, 100)) / 8)
    assert table.leaves == {
        "a/bias": LeafSize("dense", 256, 256, 256),
        "a/kernel": LeafSize("2:4", 16384, groups * 2 * 2 + groups // 2, least_a),
        "b/kernel": LeafSize("1x16@0.9", 128000, 200 * (16 * 4 + 2), least_b),
    }
    total = table.total
    assert total.dense == 256 + 16384 + 128000
    assert total.packed == sum(x.nbytes for x in jax.tree.leaves(PACKED))
    assert total.least == 256 + least_a + least_b
    assert table.leaves["a/kernel"].ratio == 0.5625
    assert table.leaves["b/kernel"].ratio <= 0.105


def test_shapes_are_enough():
    shapes = jax.eval_shape(lambda p: prune_and_pack(p, PLAN), PARAMS)
    assert sizes(shapes) == sizes(PACKED)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "3:5", "4:8", "1:16", "8:32", "1x4@0.5"])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_nothing_is_smaller_than_the_least(pattern, lead):
    shape = (160, 8)
    plan = nmjax.make_plan({"kernel": jnp.ones(shape)}, pattern)
    weights = {"kernel": jax.ShapeDtypeStruct((*lead, *shape), "float32")}
    leaf = sizes(jax.eval_shape(lambda w: prune_and_pack(w, plan), weights)).leaves["kernel"]
    assert leaf.least <= leaf.packed <= leaf.dense
    assert leaf.dense == 4 * math.prod((*lead, *shape))


def test_the_table():
    lines = str(sizes(PACKED)).split("\n")
    assert (
        " ".join(lines[0].split()) == "leaf pattern dense bytes packed lower bound packed / dense"
    )
    assert lines[3].split() == ["a/kernel", "2:4", "16,384", "9,216", "8,854", "0.5625"]
    assert lines[-1].split()[:2] == ["total", "144,640"]
    html = sizes(PACKED)._repr_html_()
    assert html.count("<tr>") == 5
    assert "16,384" in html


@pytest.mark.parametrize("m", [1024, 1025, 2048])
@pytest.mark.parametrize("n", [1, 300, 1023])
def test_bits_of_long_groups(n, m):
    """Beyond 1,024 by the gamma function, because the binomial coefficients become too long."""
    bits = nmjax.NM(n, m).index_bits * m
    assert math.isclose(bits, math.log2(math.comb(m, n)), rel_tol=1e-9)


@pytest.mark.parametrize("wrong", ["x", 3, len])
def test_what_is_not_a_tree_has_no_sizes(wrong):
    with pytest.raises(TypeError, match="expected a tree of arrays or packed weights, got"):
        nmjax.sizes(wrong)
