"""Plans as values: in and out of jit, as tables, and what they refuse."""

import copy
import pickle
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax import NM, LeafPlan, make_plan
from nmjax.plans import DenseLeaf
from nmjax.trees.leaves import named_leaves


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


TWO_LAYERS = {
    "a": {"kernel": normal((8, 16)), "bias": jnp.zeros(16)},
    "b": {"kernel": normal((16, 4)), "bias": jnp.zeros(4)},
}


# Groups never straddle

STRADDLING = {
    "conv_stem": {"kernel": normal((3, 3, 3, 8))},
    "body": {"kernel": normal((8, 8))},
    "head": {"kernel": normal((6, 2))},
}


def test_all_leaves_that_do_not_divide_are_named_with_the_way_out():
    with pytest.raises(
        ValueError, match="these leaves do not divide into whole groups or blocks"
    ) as error:
        make_plan(STRADDLING, "2:4")
    message = str(error.value)
    assert "conv_stem/kernel (3, 3, 3, 8): 3 inputs are not a multiple of 4 (axes -2)" in message
    assert "head/kernel (6, 2): 6 inputs are not a multiple of 4 (axes -2)" in message
    assert "body" not in message
    assert "exclude=" in message
    assert 'on_indivisible="dense"' in message


def test_they_can_stay_dense():
    plan = make_plan(STRADDLING, "2:4", on_indivisible="dense")
    assert set(plan) == {"body/kernel"}
    assert plan.dense == {
        "head/kernel": "6 inputs are not a multiple of 4",
        "conv_stem/kernel": "3 inputs are not a multiple of 4",
    }


def test_they_can_be_excluded_or_take_another_pattern():
    assert set(make_plan(STRADDLING, "2:4", exclude=("stem", "head"))) == {"body/kernel"}
    plan = make_plan(STRADDLING, "2:4", rules={"conv_stem": "1:3", "head": "1:2"})
    patterns = {name: str(leaf.pattern) for name, leaf in plan.items()}
    assert patterns == {"body/kernel": "2:4", "conv_stem/kernel": "1:3", "head/kernel": "1:2"}


def test_the_rows_of_several_axes_count_together():
    # Neither 2 heads nor heads of 2 divide by 4, but the 4 inputs of out do.
    shapes = {n: {"kernel": jnp.ones((8, 2, 2))} for n in ("query", "key", "value")}
    plan = make_plan({**shapes, "out": {"kernel": jnp.ones((2, 2, 8))}}, "2:4")
    assert plan["out/kernel"].reduction_axes == (-3, -2)


def test_unknown_on_indivisible():
    with pytest.raises(ValueError, match="on_indivisible must be"):
        make_plan(TWO_LAYERS, "2:4", on_indivisible="skip")


# Other bad input


@pytest.mark.parametrize("dtype", ["int8", "int32", "complex64", "bool"])
def test_weights_that_are_not_floating(dtype):
    params = {"a": {"kernel": jnp.ones((8, 4), dtype)}, "b": {"kernel": jnp.ones((8, 4))}}
    with pytest.raises(TypeError, match=f"a/kernel has dtype {dtype}"):
        make_plan(params, "2:4")
    assert set(make_plan(params, "2:4", exclude="a/")) == {"b/kernel"}


def test_nothing_sparse():
    with pytest.raises(ValueError, match=r"no leaf becomes sparse:\n  bias \(4,\): bias"):
        make_plan({"bias": jnp.zeros(4)}, "2:4")


def test_two_leaves_of_one_name():
    params = {"a/kernel": jnp.ones((8, 4)), "a": {"kernel": jnp.ones((8, 4))}}
    with pytest.raises(ValueError, match="have the name 'a/kernel'"):
        make_plan(params, "2:4")


@pytest.mark.parametrize("pattern", [2, None, (2, 4)])
def test_no_pattern(pattern):
    with pytest.raises(TypeError, match="a pattern is text"):
        make_plan(TWO_LAYERS, pattern)


def test_params_that_do_not_fit():
    plan = make_plan(TWO_LAYERS, "2:4")
    other = {"a": {"kernel": jnp.ones((8, 8))}, "c": {"kernel": jnp.ones((16, 4))}}
    with pytest.raises(ValueError, match="do not fit the plan") as error:
        nmjax.compute_masks(other, plan)
    assert "a/kernel: planned as (8, 16), got (8, 8)" in str(error.value)
    assert "b/kernel: planned as (16, 4), not in the tree" in str(error.value)


# The plan itself


def test_a_plan_is_a_mapping_over_planned_leaves():
    plan = make_plan(TWO_LAYERS, "2:4")
    assert list(plan) == ["a/kernel", "b/kernel"]
    assert len(plan) == 2
    assert "a/kernel" in plan
    assert "a/bias" not in plan
    assert plan["a/kernel"] == LeafPlan(NM(2, 4), (-2,), (-1,), (8, 16))
    assert plan.get("nothing") is None
    with pytest.raises(KeyError):
        plan["a/bias"]
    assert dict(plan.items()) == dict(zip(plan.keys(), plan.values(), strict=True))


def test_every_leaf_is_planned_or_has_a_reason_in_tree_order():
    plan = make_plan(TWO_LAYERS, "2:4")
    assert [name for name, _ in plan.leaves] == list(named_leaves(TWO_LAYERS))
    assert plan.keys() | plan.dense.keys() == named_leaves(TWO_LAYERS).keys()
    assert not plan.keys() & plan.dense.keys()
    assert all(isinstance(leaf, LeafPlan | DenseLeaf) for _, leaf in plan.leaves)


def test_weights_and_kept():
    leaf = make_plan(TWO_LAYERS, "1:8")["a/kernel"]
    assert (leaf.weights, leaf.kept) == (128, 16)


def test_equal_plans_are_equal_and_hash_alike():
    plan, again = make_plan(TWO_LAYERS, "2:4"), make_plan(TWO_LAYERS, NM(2, 4))
    assert plan == again
    assert hash(plan) == hash(again)
    others = [
        make_plan(TWO_LAYERS, "1:4"),
        make_plan(TWO_LAYERS, "2:4", exclude="b/"),
        make_plan(TWO_LAYERS, "2:4", axes={"a/kernel": -1}),
        make_plan(TWO_LAYERS, "2:4", score=jnp.square),
    ]
    assert all(plan != other for other in others)


def test_plans_are_frozen_and_can_be_copied_and_pickled():
    plan = make_plan(TWO_LAYERS, "2:4")
    with pytest.raises(AttributeError):
        plan.leaves = ()
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan


@pytest.mark.parametrize("static", [{"static_argnums": 1}, {"static_argnames": "plan"}, {}])
def test_plans_as_arguments_of_jit_compile_once_for_equal_plans(static):
    traces = []

    def pruned(params, plan):
        traces.append(plan)
        return nmjax.prune(params, plan)

    jitted = jax.jit(pruned, **static)
    plan = make_plan(TWO_LAYERS, "2:4")
    expected = nmjax.prune(TWO_LAYERS, plan)
    same = jax.tree.map(lambda a, b: (a == b).all(), jitted(TWO_LAYERS, plan), expected)
    assert jax.tree.all(same)
    jitted(TWO_LAYERS, make_plan(TWO_LAYERS, "2:4"))
    assert len(traces) == 1
    jitted(TWO_LAYERS, make_plan(TWO_LAYERS, "1:4"))
    assert len(traces) == 2


def test_a_plan_has_no_leaves_for_jax():
    plan = make_plan(TWO_LAYERS, "2:4")
    assert jax.tree.leaves(plan) == []
    assert jax.tree.map(lambda x: x + 1, {"plan": plan, "x": 1}) == {"plan": plan, "x": 2}


def test_a_plan_can_be_made_inside_jit():
    @jax.jit
    def masked(params):
        return nmjax.prune(params, make_plan(params, "2:4"))

    assert (masked(TWO_LAYERS)["a"]["kernel"] != 0).sum() == 64


def test_leaves_with_more_axes_in_front_than_planned():
    plan = make_plan(TWO_LAYERS, "2:4")
    seeds = jax.tree.map(lambda p: jnp.stack([p, 2 * p[::-1]]), TWO_LAYERS)
    masks = nmjax.compute_masks(seeds, plan)
    for i in range(2):
        alone = nmjax.compute_masks(jax.tree.map(lambda p, i=i: p[i], seeds), plan)
        for name in plan:
            np.testing.assert_array_equal(masks[name][i], alone[name])
    batched = jax.vmap(lambda p: nmjax.compute_masks(p, plan))(seeds)
    for name in plan:
        np.testing.assert_array_equal(masks[name], batched[name])


# What it prints


def test_the_table_shows_every_leaf():
    plan = make_plan(TWO_LAYERS, "2:4", exclude="b/kernel", rules={"a": NM(1, 8)})
    lines = str(plan).split("\n")
    cells = {line.split()[0]: line.split() for line in lines[2:6]}
    assert cells == {
        "a/bias": ["a/bias", "16", "dense", "16", "16", "bias"],
        "a/kernel": ["a/kernel", "8x16", "1:8", "-2", "known", "layer", "128", "16"],
        "b/bias": ["b/bias", "4", "dense", "4", "4", "bias"],
        "b/kernel": ["b/kernel", "16x4", "dense", "64", "64", "excluded", "by", "'b/kernel'"],
    }
    assert re.split("  +", lines[0])[:6] == [
        "leaf",
        "shape",
        "pattern",
        "axes",
        "axes from",
        "weights",
    ]


def test_the_summary_adds_up():
    plan = make_plan(TWO_LAYERS, "1:4")
    sizes = {name: leaf.size for name, leaf in named_leaves(TWO_LAYERS).items()}
    pruned = nmjax.prune(TWO_LAYERS, plan)
    stay = sum(
        int((leaf != 0).sum()) if name in plan else leaf.size
        for name, leaf in named_leaves(pruned).items()
    )
    sparse = sizes["a/kernel"] + sizes["b/kernel"]
    assert str(plan).endswith(
        f"2 of 4 leaves are sparse; they hold {sparse} of {sum(sizes.values())} parameters. "
        f"{stay} parameters are kept ({stay / sum(sizes.values()):.1%})."
    )


def test_big_numbers_are_grouped_and_scalars_named():
    params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), "t": jnp.zeros(())}
    text = str(make_plan(params, "2:4"))
    assert "16,777,216" in text
    assert "8,388,608" in text
    assert re.search(r"^t +scalar +dense +1 +1 +0-D$", text, re.MULTILINE)


class Cells(HTMLParser):
    """Collects the text of table cells, and fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.tags = [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_html_for_notebooks_is_whole_and_escaped():
    params = {"<b>&": {"kernel": normal((8, 4)), '"q"': jnp.zeros(4)}}
    shown = Cells(make_plan(params, "2:4", axes={"<b>&/kernel": -2})._repr_html_())
    assert shown.tags == {"table", "thead", "tbody", "tr", "th", "td", "p"}  # No <b>.
    assert [row[0] for row in shown.rows] == ["leaf", '<b>&/"q"', "<b>&/kernel"]
    assert shown.rows[2] == ["<b>&/kernel", "8x4", "2:4", "-2", "given", "32", "16", ""]
