"""A plan applied to trees: which leaves change, how, with what gradient, and what is refused."""

from dataclasses import dataclass

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax

RNG = np.random.default_rng(0)


def make_params(dtype="float32"):
    """A convolution, an attention block's input and output, a matrix, and what stays dense."""
    shapes = {
        "conv": {"kernel": (3, 3, 8, 4), "bias": (4,)},
        "attention": {
            "query": {"kernel": (8, 2, 4), "bias": (2, 4)},
            "out": {"kernel": (2, 4, 8), "bias": (8,)},
        },
        "norm": {"scale": (8,)},
        "head": {"kernel": (8, 3)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(RNG.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS = make_params()
PLAN = nmjax.make_plan(PARAMS, "2:4", exclude="head")
PLANNED = ["attention/out/kernel", "attention/query/kernel", "conv/kernel"]


def brute_force(w, axes, n=2, m=4):
    """The mask by sorting each group: largest magnitude first, of equal ones the lower index."""
    w = np.asarray(w, np.float64)
    moved = np.moveaxis(w, axes, range(-len(axes), 0))
    groups = np.abs(moved.reshape(-1, m))
    mask = np.zeros(groups.shape, bool)
    for group, row in zip(groups, mask, strict=True):
        row[np.argsort(-group, kind="stable")[:n]] = True
    return np.moveaxis(mask.reshape(moved.shape), range(-len(axes), 0), axes)


def leaf(tree, name):
    for key in name.split("/"):
        tree = tree[key]
    return tree


EXPECTED = {
    "conv/kernel": brute_force(PARAMS["conv"]["kernel"], (-2,)),
    "attention/query/kernel": brute_force(PARAMS["attention"]["query"]["kernel"], (-3,)),
    "attention/out/kernel": brute_force(PARAMS["attention"]["out"]["kernel"], (-3, -2)),
}


def test_masks_by_name():
    masks = nmjax.compute_masks(PARAMS, PLAN)
    assert sorted(masks) == PLANNED
    for name, mask in masks.items():
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, EXPECTED[name], err_msg=name)


@pytest.mark.parametrize("function", [nmjax.sparsify, nmjax.prune])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_planned_leaves_are_masked_and_others_untouched(function, given, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    masks = nmjax.compute_masks(params, PLAN)
    out = function(params, PLAN, masks if given else None)
    assert jax.tree.structure(out) == jax.tree.structure(params)
    assert jax.tree.map(lambda x: x.dtype, out) == jax.tree.map(lambda x: x.dtype, params)
    for name in PLANNED:
        expected = jnp.where(masks[name], leaf(params, name), 0)
        np.testing.assert_array_equal(leaf(out, name), expected)
    assert out["head"]["kernel"] is params["head"]["kernel"]
    assert out["norm"]["scale"] is params["norm"]["scale"]


def test_given_masks_win():
    masks = {name: ~mask for name, mask in EXPECTED.items()}
    for out in (nmjax.sparsify(PARAMS, PLAN, masks), nmjax.prune(PARAMS, PLAN, masks)):
        for name in PLANNED:
            expected = jnp.where(masks[name], leaf(PARAMS, name), 0)
            np.testing.assert_array_equal(leaf(out, name), expected)


def test_pruned_parameters_are_a_fixed_point():
    once = nmjax.prune(PARAMS, PLAN)
    twice = nmjax.prune(once, PLAN)
    jax.tree.map(np.testing.assert_array_equal, once, twice)


# Gradients


def weighted_sum(tree):
    """Its gradient is 1, 2, 3 ... in the order of the leaves."""
    sums = (jnp.sum(x).astype(jnp.float32) for x in jax.tree.leaves(tree))
    return sum(i * x for i, x in enumerate(sums, start=1))


def expected_gradient(pull=lambda name, w, mask: 0.0):
    grads = jax.grad(weighted_sum)(PARAMS)
    for name in PLANNED:
        parent = leaf(grads, name.rpartition("/")[0])
        parent["kernel"] += pull(name, leaf(PARAMS, name), EXPECTED[name])
    return grads


def assert_trees_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def test_sparsify_is_straight_through():
    grads = jax.jit(jax.grad(lambda p: weighted_sum(nmjax.sparsify(p, PLAN))))(PARAMS)
    assert_trees_close(grads, expected_gradient())


def test_sparsify_with_lambda_pulls_the_pruned_weights():
    def grad(p, lambda_w):
        return jax.grad(lambda p: weighted_sum(nmjax.sparsify(p, PLAN, lambda_w=lambda_w)))(p)

    expected = expected_gradient(lambda name, w, mask: jnp.where(mask, 0, 0.5 * w))
    assert_trees_close(grad(PARAMS, 0.5), expected)
    assert_trees_close(jax.jit(grad)(PARAMS, jnp.float32(0.5)), expected)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sparsify_rounds_behind_the_mask(dtype, given):
    # Some of what is kept rounds to zero in float16, and is not pulled for that.
    def with_small(w):
        columns = np.arange(w.shape[-1]) % 2 == 0
        return jnp.asarray(np.where(columns, np.float32(1e-8), np.float32(1)) * np.asarray(w))

    params = jax.tree.map(with_small, PARAMS)
    masks = nmjax.compute_masks(params, PLAN)

    def loss(p):
        out = nmjax.sparsify(p, PLAN, masks if given else None, lambda_w=0.5, dtype=dtype)
        return weighted_sum(jax.tree.map(lambda x: x.astype("float32"), out)), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected = jax.grad(weighted_sum)(params)
    for name in PLANNED:
        kept = jnp.where(masks[name], leaf(params, name), 0).astype(dtype)
        np.testing.assert_array_equal(leaf(out, name), kept)
        assert leaf(out, name).dtype == dtype
        pull = jnp.where(masks[name], 0, 0.5 * leaf(params, name))
        assert leaf(grads, name).dtype == jnp.float32
        np.testing.assert_allclose(leaf(grads, name), leaf(expected, name) + pull, rtol=1e-6)
    assert out["head"]["kernel"].dtype == jnp.float32
    plain = jax.grad(lambda p: weighted_sum(nmjax.sparsify(p, PLAN, dtype=dtype)))(params)
    assert_trees_close(plain, expected)


def test_sparse_weights_are_real_floats():
    with pytest.raises(TypeError, match="real floating dtype, such as bfloat16; got 'int8'"):
        nmjax.sparsify(PARAMS, PLAN, dtype="int8")


def test_prune_stops_the_gradient_to_pruned_weights():
    grads = jax.grad(lambda p: weighted_sum(nmjax.prune(p, PLAN)))(PARAMS)
    dense = jax.grad(weighted_sum)(PARAMS)
    for name in PLANNED:
        expected = jnp.where(EXPECTED[name], leaf(dense, name), 0)
        np.testing.assert_array_equal(leaf(grads, name), expected)
    np.testing.assert_array_equal(grads["head"]["kernel"], dense["head"]["kernel"])


# Trees


@dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


jax.tree_util.register_dataclass(Layer, ["kernel", "bias"], [])

TREES = {
    "dict": lambda k, b: {"layer": {"kernel": k, "bias": b}},
    "FrozenDict": lambda k, b: flax.core.freeze({"layer": {"kernel": k, "bias": b}}),
    "dataclass": lambda k, b: {"layer": Layer(k, b)},
    "boxed": lambda k, b: {"layer": {"kernel": nn.Partitioned(k, ("in", "out")), "bias": b}},
}


@pytest.mark.parametrize("kind", TREES)
def test_every_kind_of_tree_keeps_its_kind(kind):
    kernel, bias = jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32), jnp.ones(2)
    params = TREES[kind](kernel, bias)
    plan = nmjax.make_plan(params, "1:4")
    out = nmjax.sparsify(params, plan)
    assert jax.tree.structure(out) == jax.tree.structure(params)
    pruned = jnp.where(brute_force(kernel, (-2,), 1), kernel, 0)
    assert_trees_close(out, TREES[kind](pruned, bias))
    assert list(nmjax.compute_masks(params, plan)) == ["layer/kernel"]


@pytest.mark.parametrize("kind", TREES)
def test_a_plan_fits_every_kind_of_the_same_tree(kind):
    kernel, bias = jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32), jnp.ones(2)
    plan = nmjax.make_plan(TREES["dict"](kernel, bias), "1:4")
    masks = nmjax.compute_masks(TREES["dict"](kernel, bias), plan)
    params = TREES[kind](kernel, bias)
    assert_trees_close(nmjax.prune(params, plan, masks), nmjax.prune(params, plan))


def test_leaves_with_more_axes_in_front():
    """A stack of seeds, or layers under scan, is pruned as each of its members is."""
    params = {"kernel": jnp.asarray(RNG.normal(size=(5, 8, 3)), jnp.float32)}
    plan = nmjax.make_plan({"kernel": jnp.zeros((8, 3))}, "2:4")
    stacked = nmjax.prune(params, plan)["kernel"]
    np.testing.assert_array_equal(
        stacked, jax.vmap(lambda p: nmjax.prune(p, plan))(params)["kernel"]
    )
    expected = jnp.where(brute_force(params["kernel"], (-2,)), params["kernel"], 0)
    np.testing.assert_array_equal(stacked, expected)


@pytest.mark.not_under("jax_disable_jit")
def test_plan_is_a_static_argument():
    traces = 0

    def masks(params, plan):
        nonlocal traces
        traces += 1
        return nmjax.compute_masks(params, plan)

    for call in (jax.jit(masks), jax.jit(masks, static_argnums=1)):
        traces = 0
        for _ in range(2):
            plan = nmjax.make_plan(PARAMS, "2:4", exclude="head")  # equal, not the same object
            call(PARAMS, plan)
        assert traces == 1


def test_abstract_evaluation():
    shapes = jax.eval_shape(lambda p: nmjax.sparsify(p, PLAN), PARAMS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), PARAMS
    )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("d", None), (None, "d")])
def test_shardings_are_kept(axis_type, spec):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    w = jnp.asarray(RNG.normal(size=(32, 16)), jnp.float32)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    params = {"kernel": jax.device_put(w, sharding)}
    plan = nmjax.make_plan(params, "2:4")
    with jax.set_mesh(mesh):
        for function in (nmjax.sparsify, nmjax.prune, nmjax.compute_masks):
            out = jax.jit(function)(params, plan)["kernel"]
            assert out.sharding.is_equivalent_to(sharding, w.ndim)
            np.testing.assert_array_equal(out, function({"kernel": w}, plan)["kernel"])


# Bad input


@pytest.mark.parametrize(
    "function", [nmjax.compute_masks, nmjax.sparsify, nmjax.prune], ids=lambda f: f.__name__
)
def test_params_that_do_not_fit_the_plan(function):
    wrong = {**PARAMS, "conv": {"kernel": jnp.zeros((3, 3, 4, 8))}}
    del wrong["attention"]
    with pytest.raises(ValueError, match="do not fit the plan") as error:
        function(wrong, PLAN)
    message = str(error.value)
    assert "conv/kernel: planned as (3, 3, 8, 4), got (3, 3, 4, 8)" in message
    assert "attention/query/kernel: planned as (8, 2, 4), not in the tree" in message
    assert "attention/out/kernel" in message
    assert "norm" not in message


@pytest.mark.parametrize("shape", [(8,), (2, 8), (16, 4), (8, 4, 1)])
def test_another_shape_is_refused(shape):
    plan = nmjax.make_plan({"kernel": jnp.zeros((8, 4))}, "2:4")
    with pytest.raises(ValueError, match=r"kernel: planned as \(8, 4\)"):
        nmjax.sparsify({"kernel": jnp.zeros(shape)}, plan)


@pytest.mark.parametrize("function", [nmjax.sparsify, nmjax.prune])
def test_masks_that_do_not_fit(function):
    masks = nmjax.compute_masks(PARAMS, PLAN)
    with pytest.raises(ValueError, match=r"conv/kernel.*\(3, 3, 4, 8\).*\(3, 3, 8, 4\)"):
        function(PARAMS, PLAN, {**masks, "conv/kernel": masks["conv/kernel"].swapaxes(-1, -2)})
    with pytest.raises(TypeError, match=r"conv/kernel.*float32"):
        function(PARAMS, PLAN, {**masks, "conv/kernel": PARAMS["conv"]["kernel"]})
    with pytest.raises(ValueError, match=r"missing: \['attention/out/kernel'\]"):
        function(PARAMS, PLAN, {n: m for n, m in masks.items() if n != "attention/out/kernel"})
    with pytest.raises(ValueError, match=r"not planned: \['head/kernel'\]"):
        function(PARAMS, PLAN, {**masks, "head/kernel": jnp.ones((8, 3), bool)})


def test_lambda_that_is_no_scalar():
    with pytest.raises(ValueError, match="lambda_w must be a scalar"):
        nmjax.sparsify(PARAMS, PLAN, lambda_w=jnp.ones(3))


@pytest.mark.parametrize("dtype", ["int8", "complex64"])
def test_weights_that_are_no_real_floats_are_named(dtype):
    params = {"first": {"w": jnp.ones((8, 4))}, "second": {"w": jnp.ones((8, 4))}}
    plan = nmjax.make_plan(params, "2:4")
    changed = {**params, "second": {"w": params["second"]["w"].astype(dtype)}}
    for function in (nmjax.compute_masks, nmjax.sparsify, nmjax.prune):
        with pytest.raises(TypeError, match=f"but second/w has dtype {dtype}"):
            function(changed, plan)


@pytest.mark.parametrize(
    "call",
    [
        lambda params: nmjax.compute_masks(params, "2:4"),
        lambda params: nmjax.sparsify(params, "2:4"),
        lambda params: nmjax.pack(params, "2:4"),
        lambda params: nmjax.add_sparse_refined("2:4"),
        lambda params: nmjax.straight_through("2:4"),
        lambda params: nmjax.one_shot("2:4"),
        lambda params: nmjax.prune(params, params),
    ],
)
def test_what_is_not_a_plan_is_named(call):
    with pytest.raises(TypeError, match=r"expected a plan, got '(2:4|dict)'; make one"):
        call({"kernel": jnp.ones((8, 4))})


def test_swapped_arguments_are_named():
    params = {"kernel": jnp.ones((8, 4))}
    with pytest.raises(TypeError, match="a plan and then dict; swap the two"):
        nmjax.prune(nmjax.make_plan(params, "2:4"), params)


def test_a_plan_for_the_variables_says_so():
    params = {"layer": {"kernel": jnp.ones((8, 4))}}
    inner, outer = (nmjax.make_plan(tree, "2:4") for tree in (params, {"params": params}))
    with pytest.raises(ValueError, match=r"'params' at the top: pass \{'params': params\}"):
        nmjax.prune(params, outer)
    with pytest.raises(ValueError, match=r"below 'params': pass params\['params'\]"):
        nmjax.prune({"params": params}, inner)
    with pytest.raises(ValueError, match="Make the plan from these parameters"):
        nmjax.prune({"other": params}, inner)


def test_planned_leaves_are_arrays():
    plan = nmjax.make_plan({"a": jnp.ones((8, 4)), "w": jnp.ones((8, 4))}, "2:4", axes={"a": -2})
    with pytest.raises(TypeError, match="must be arrays, but a is of type str"):
        nmjax.sparsify({"a": "text", "w": jnp.ones((8, 4))}, plan)


def test_a_tree_of_masks_is_refused():
    masks = {"layer": {"kernel": jnp.ones((8, 4), bool)}}
    with pytest.raises(TypeError, match="a tree below 'layer'"):
        nmjax.sad(masks, masks)
