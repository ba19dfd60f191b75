"""Path rules, axes given by hand, and grouping over whole filters."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax import NM, make_plan


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def axes_of(plan):
    return {name: leaf.reduction_axes for name, leaf in plan.items()}


TWO_LAYERS = {
    "a": {"kernel": normal((8, 16)), "bias": jnp.zeros(16)},
    "b": {"kernel": normal((16, 4)), "bias": jnp.zeros(4)},
}


def patterns_of(plan):
    return {name: str(leaf.pattern) for name, leaf in plan.items()}


def test_exclude_takes_text_or_several():
    assert set(make_plan(TWO_LAYERS, "2:4", exclude="b/")) == {"a/kernel"}
    assert set(make_plan(TWO_LAYERS, "2:4", exclude=("b/", "bias"))) == {"a/kernel"}
    assert set(make_plan(TWO_LAYERS, "2:4", exclude=["a/"])) == {"b/kernel"}


def test_excluded_leaves_say_which_rule_it_was():
    plan = make_plan(TWO_LAYERS, "2:4", exclude=("bias", "^b", "b/kernel"))
    assert plan.dense["b/kernel"] == "excluded by '^b'"
    assert plan.dense["a/bias"] == "bias"  # What it is comes before who asked.


def test_include_narrows():
    plan = make_plan(TWO_LAYERS, "2:4", include="b/")
    assert set(plan) == {"b/kernel"}
    assert plan.dense["a/kernel"] == "not included"


def test_exclude_wins_over_include_and_rules():
    plan = make_plan(TWO_LAYERS, "2:4", include=("a/", "b/"), exclude="b/", rules={"kernel": "1:4"})
    assert patterns_of(plan) == {"a/kernel": "1:4"}
    assert plan.dense["b/kernel"] == "excluded by 'b/'"


def test_include_wins_over_rules():
    plan = make_plan(TWO_LAYERS, "2:4", include="a/", rules={"kernel": "1:4"})
    assert patterns_of(plan) == {"a/kernel": "1:4"}


def test_the_first_rule_that_matches_counts():
    plan = make_plan(TWO_LAYERS, "2:4", rules={"a/": "1:4", "kernel": NM(1, 8)})
    assert patterns_of(plan) == {"a/kernel": "1:4", "b/kernel": "1:8"}


def test_a_leaf_that_no_rule_matches_takes_the_pattern():
    assert patterns_of(make_plan(TWO_LAYERS, "2:4", rules={"a/": "1:4"})) == {
        "a/kernel": "1:4",
        "b/kernel": "2:4",
    }


def test_a_rule_can_leave_a_leaf_dense():
    plan = make_plan(TWO_LAYERS, "2:4", rules={"a/": None})
    assert set(plan) == {"b/kernel"}
    assert plan.dense["a/kernel"] == "left dense by the rule 'a/'"


def test_rules_are_searched_for_anywhere_unless_anchored():
    params = {"head": {"kernel": normal((8, 4))}, "pre_head": {"kernel": normal((8, 4))}}
    with pytest.raises(ValueError, match="no leaf becomes sparse"):
        make_plan(params, "2:4", exclude="head")
    assert set(make_plan(params, "2:4", exclude="^head")) == {"pre_head/kernel"}


@pytest.mark.parametrize("argument", ["exclude", "include", "rules", "axes"])
def test_a_rule_that_matches_nothing(argument):
    value = {"rules": {"hed": "1:4"}, "axes": {"hed": -1}}.get(argument, ("kernel", "hed"))
    with pytest.raises(ValueError, match="these path rules match no leaf: 'hed'") as error:
        make_plan(TWO_LAYERS, "2:4", **{argument: value})
    for name in ("a/kernel", "a/bias", "b/kernel", "b/bias"):
        assert name in str(error.value)  # The way out: what there is to match.


def test_a_rule_that_an_earlier_one_shadows():
    with pytest.raises(ValueError, match="makes no leaf sparse") as error:
        make_plan(TWO_LAYERS, "2:4", rules={"kernel": "2:4", "^a": "1:4"})
    assert "the rule '^a': 1:4" in str(error.value)
    assert "a/kernel (8, 16): taken by an earlier rule" in str(error.value)


def test_a_rule_for_dense_that_an_earlier_one_shadows():
    with pytest.raises(ValueError, match="the rule '\\^a': None makes no leaf dense") as error:
        make_plan(TWO_LAYERS, "2:4", rules={"kernel": "2:4", "^a": None})
    assert "a/kernel (8, 16): taken by an earlier rule" in str(error.value)


def test_a_rule_for_dense_that_only_repeats_what_holds_anyway():
    assert make_plan(TWO_LAYERS, "2:4", rules={"bias": None}) == make_plan(TWO_LAYERS, "2:4")


def test_a_rule_whose_leaves_cannot_be_sparse():
    with pytest.raises(ValueError, match=r"a/bias \(16,\): bias"):
        make_plan(TWO_LAYERS, "2:4", rules={"bias": "1:4"})


def test_a_rule_whose_leaves_are_excluded():
    with pytest.raises(ValueError, match=r"b/kernel \(16, 4\): excluded by 'b/'"):
        make_plan(TWO_LAYERS, "2:4", exclude="b/", rules={"b/": "1:4"})


def test_a_rule_that_is_no_regular_expression():
    with pytest.raises(
        ValueError, match=re.escape("the path rule '(' is not a regular expression")
    ):
        make_plan(TWO_LAYERS, "2:4", exclude="(")


def test_a_rule_that_is_no_text():
    with pytest.raises(TypeError, match="a path rule must be a string, got 1"):
        make_plan(TWO_LAYERS, "2:4", rules={1: "2:4"})


# Axes by hand


def test_axes_given_by_hand():
    plan = make_plan(TWO_LAYERS, "2:4", axes={"a/kernel": -1})
    assert axes_of(plan) == {"a/kernel": (-1,), "b/kernel": (-2,)}
    assert plan["a/kernel"].output_axes == (-2,)


@pytest.mark.parametrize("axes", [(0, 1), [0, 1], (-3, -2), (np.int64(0), -2)])
def test_axes_count_from_either_end(axes):
    params = {"out": {"kernel": normal((4, 4, 8))}}
    plan = make_plan(params, "2:4", axes={"out": axes})
    assert plan["out/kernel"].reduction_axes == (-3, -2)
    assert plan["out/kernel"].output_axes == (-1,)


def test_axes_are_flattened_in_the_order_given():
    params = {"x": normal((4, 2, 3))}
    for axes in ((0, 1), (1, 0)):
        mask = nmjax.compute_masks(params, make_plan(params, "1:4", axes={"x": axes}))["x"]
        flat = np.asarray(mask).transpose(*axes, 2).reshape(2, 4, 3)
        np.testing.assert_array_equal(flat.sum(axis=1), 1)


def test_axes_make_a_weight_of_what_is_none_by_name():
    params = {"embedding": normal((32, 8)), "tokens": normal((1, 4, 8)), "b": normal((8, 8))}
    assert set(make_plan(params, "2:4", axes={"": -1})) == set(params)


@pytest.mark.parametrize("axes", [2, -3, (0, 5)])
def test_axes_that_a_leaf_does_not_have(axes):
    with pytest.raises(ValueError, match=r"does not fit a/kernel of shape \(8, 16\).* 2 axes"):
        make_plan(TWO_LAYERS, "2:4", axes={"a/kernel": axes})


def test_an_axis_named_twice():
    with pytest.raises(ValueError, match=r"a/kernel.*an axis is given twice"):
        make_plan(TWO_LAYERS, "2:4", axes={"a/kernel": (0, -2)})


@pytest.mark.parametrize("axes", [1.0, "1", (), None, True, (0, 1.0)])
def test_axes_of_the_wrong_type(axes):
    with pytest.raises(TypeError, match="must be one or more integers"):
        make_plan(TWO_LAYERS, "2:4", axes={"a/kernel": axes})


# Grouping over whole filters


def original_mask(w_oihw, n, m):
    """The grouping of the original paper, in NumPy: the flattened OIHW tensor in rows of m."""
    rows = np.abs(w_oihw).reshape(-1, m)
    order = np.argsort(-rows, axis=1, kind="stable")
    mask = np.zeros(rows.shape, bool)
    np.put_along_axis(mask, order[:, :n], True, axis=1)
    return mask.reshape(w_oihw.shape)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (5, 9)])
@pytest.mark.parametrize("layout", ["HWIO", "OIHW"])
def test_flattening_a_filter_as_the_original(n, m, layout):
    w_oihw = np.asarray(normal((6, 8, 3, 3)))
    if layout == "HWIO":
        name, w, to_oihw = "kernel", w_oihw.transpose(2, 3, 1, 0), (3, 2, 0, 1)
    else:
        name, w, to_oihw = "weight", w_oihw, (0, 1, 2, 3)
    params = {"conv": {name: w, "bias": np.zeros(6)}}
    plan = make_plan(params, f"{n}:{m}/kernel")
    mask = nmjax.compute_masks(params, plan)[f"conv/{name}"]
    np.testing.assert_array_equal(np.asarray(mask).transpose(to_oihw), original_mask(w_oihw, n, m))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("kernel", (1, 1, 16, 8)),
        ("weight", (8, 16, 1, 1)),
        ("kernel", (16, 8)),
        ("weight", (8, 16)),
    ],
)
def test_both_groupings_agree_where_a_filter_has_one_tap(name, shape):
    params = {"conv": {name: normal(shape), "bias": np.zeros(8)}}
    channel, kernel = (
        nmjax.compute_masks(params, make_plan(params, pattern))[f"conv/{name}"]
        for pattern in ("2:4", "2:4/kernel")
    )
    np.testing.assert_array_equal(channel, kernel)


def test_both_groupings_agree_for_attention():
    attention = nn.MultiHeadDotProductAttention(2, qkv_features=8)
    params = jax.jit(attention.init)(jax.random.key(0), normal((1, 3, 8)))["params"]
    channel, kernel = (
        nmjax.compute_masks(params, make_plan(params, pattern)) for pattern in ("2:4", "2:4/kernel")
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), channel, kernel))


def test_the_two_groupings_differ_for_wider_filters():
    params = {"kernel": normal((3, 3, 8, 4)), "bias": np.zeros(4)}
    channel, kernel = (
        nmjax.compute_masks(params, make_plan(params, pattern))["kernel"]
        for pattern in ("2:4", "2:4/kernel")
    )
    assert (channel != kernel).any()


def test_a_filter_that_cannot_be_flattened():
    params = {"conv": {"kernel": normal((3, 8, 4))}}
    with pytest.raises(
        ValueError, match=r"conv/kernel of shape \(3, 8, 4\) cannot take 2:4/kernel"
    ):
        make_plan(params, "2:4/kernel")
    plan = make_plan(
        params | {"d": {"kernel": normal((8, 4))}}, "2:4/kernel", rules={"conv": "1:4"}
    )
    assert patterns_of(plan) == {"conv/kernel": "1:4", "d/kernel": "2:4/kernel"}


@pytest.mark.parametrize("argument", ["rules", "axes"])
def test_what_maps_no_rules(argument):
    with pytest.raises(TypeError, match=rf"{argument}= must map path rules to values"):
        make_plan({"kernel": jnp.ones((8, 4))}, "2:4", **{argument: ["kernel"]})


def test_a_tree_without_leaves():
    with pytest.raises(ValueError, match="the parameter tree has no leaves"):
        make_plan({}, "2:4")
