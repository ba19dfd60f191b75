"""Plans with blocks: which axes they take in real layers, what does not fit, what stays."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax import Axes, make_plan
from nmjax.trees.leaves import named_leaves

KEY = jax.random.key(0)


def jacobian(layer, x):
    """The (out, in) matrix by which a linear layer multiplies."""
    matrix = jax.jit(jax.jacobian(lambda flat: layer(flat.reshape(x.shape)).ravel()))(x.ravel())
    return np.asarray(matrix).reshape(-1, x.size)


def assert_blocks(weights, n, kept):
    """Each n consecutive outputs read the same inputs, `kept` of them."""
    rows = (np.asarray(weights) != 0).reshape(-1, n, weights.shape[-1])
    assert (rows == rows[:, :1]).all()
    np.testing.assert_array_equal(rows[:, 0].sum(axis=-1), kept)


def pruned(params, pattern="1x4@0.5", **selection):
    return nmjax.prune(params, make_plan(params, pattern, **selection))


def test_linen_dense():
    x = jnp.ones(10)
    sparse = pruned(jax.jit(nn.Dense(8).init)(KEY, x)["params"])
    assert_blocks(jacobian(lambda x: nn.Dense(8).apply({"params": sparse}, x), x), 4, 5)


@pytest.mark.parametrize("size", [(3,), (3, 3), (2, 2, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_linen_convolutions_drop_all_taps_together(size, groups):
    x = jnp.ones((*size, 12))
    conv = nn.Conv(8, size, padding="VALID", feature_group_count=groups)  # One output pixel.
    params = jax.jit(conv.init)(KEY, x)["params"]

    def forward(params, x):
        return conv.apply({"params": params}, x)

    sparse = pruned(params, forward=forward, inputs=(x,))
    matrix = jacobian(lambda x: forward(sparse, x), x)
    by_tap = matrix.reshape(8, -1, 12) != 0
    assert (by_tap == by_tap[:, :1]).all()
    for group in range(groups):  # Outputs of a group read its inputs only.
        outputs = slice(8 // groups * group, 8 // groups * (group + 1))
        inputs = slice(12 // groups * group, 12 // groups * (group + 1))
        assert_blocks(
            matrix[outputs].reshape(-1, by_tap.shape[1], 12)[:, 0, inputs], 4, 6 // groups
        )


def test_linen_attention():
    x = jnp.ones((1, 16))
    attention = nn.MultiHeadDotProductAttention(2)
    params = jax.jit(attention.init)(KEY, x)["params"]
    sparse = pruned(params)
    plan = make_plan(params, "1x4@0.5")
    assert plan["query/kernel"].axes == Axes((-3,), (-2, -1))
    assert plan["out/kernel"].axes == Axes((-3, -2), (-1,))
    for name in ("query", "key", "value"):
        assert_blocks(sparse[name]["kernel"].reshape(16, 16).T, 4, 8)
    assert_blocks(sparse["out"]["kernel"].reshape(16, 16).T, 4, 8)


def test_equinox_keeps_outputs_in_front():
    x = jnp.ones(10)
    linear = pruned(eqx.nn.Linear(10, 8, key=KEY))
    assert_blocks(jacobian(linear, x), 4, 5)
    x = jnp.ones((6, 3, 3))
    conv = pruned(eqx.nn.Conv2d(6, 8, 3, key=KEY))
    taps = jacobian(conv, x).reshape(8, 6, 9)
    assert ((taps != 0) == (taps[..., :1] != 0)).all()
    assert_blocks(taps[..., 0], 4, 3)


# Convolutions and stacks of layers


class Layer(nn.Module):
    bias: bool = True
    conv: bool = False

    @nn.compact
    def __call__(self, x, _):
        make = nn.Conv(8, (3, 3), use_bias=self.bias) if self.conv else nn.Dense(8, self.bias)
        return make(x), None


def scanned(**fields):
    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(
        **fields
    )
    return jax.jit(stack.init)(KEY, jnp.ones((1, 4, 4, 8)), None)["params"]


@pytest.mark.parametrize("conv", [False, True])
def test_a_bias_tells_scanned_layers_from_taps(conv):
    params = scanned(conv=conv)
    plan = make_plan(params, "1x4@0.5")
    (name,) = plan
    assert plan[name].tap_axes == ((-4, -3) if conv else ())
    masks = nmjax.compute_masks(params, plan)[name]
    for layer, mask in zip(named_leaves(params)[name], masks, strict=True):
        np.testing.assert_array_equal(mask, nmjax.block_mask(layer, 4, 0.5))
    assert plan[name].kept == masks.sum()


@pytest.mark.parametrize("conv", [False, True])
def test_without_one_they_are_not_told_apart_in_silence(conv):
    params = scanned(bias=False, conv=conv)
    ((name, kernel),) = named_leaves(params).items()
    if conv:  # Its name shows the reduction axis, which is all that groups need to know.
        message = "which are the taps of a filter, and which are a stack"
        assert set(make_plan(params, "2:4")) == {name}
    else:
        message = "unknown axes"
    with pytest.raises(ValueError, match=message) as error:
        make_plan(params, "1x4@0.5")
    assert f"{kernel.shape}" in str(error.value)
    assert name in str(error.value)
    taps = (-4, -3) if conv else ()
    plan = make_plan(params, "1x4@0.5", axes={name: Axes((-2,), (-1,), taps)})
    for layer, mask in zip(kernel, nmjax.compute_masks(params, plan)[name], strict=True):
        np.testing.assert_array_equal(mask, nmjax.block_mask(layer, 4, 0.5))


def test_a_leaf_with_more_axes_in_front_than_planned():
    params = {"kernel": jax.random.normal(KEY, (3, 3, 6, 8)), "bias": jnp.zeros(8)}
    plan = make_plan(params, "1x4@0.5")
    seeds = {"kernel": jax.random.normal(KEY, (5, 3, 3, 6, 8)), "bias": jnp.zeros((5, 8))}
    masks = nmjax.compute_masks(seeds, plan)["kernel"]
    each = [nmjax.compute_masks({"kernel": w}, plan)["kernel"] for w in seeds["kernel"]]
    np.testing.assert_array_equal(masks, each)


@pytest.mark.parametrize("given", [Axes((1,), (0,)), Axes((-1,), (-2,)), -1])
def test_axes_by_hand(given):
    params = {"x": jax.random.normal(KEY, (8, 10))}
    plan = make_plan(params, "1x4@0.5", axes={"x": given})
    assert plan["x"].axes == Axes((-1,), (-2,))
    assert_blocks(nmjax.prune(params, plan)["x"], 4, 5)


def test_reduction_axes_alone_do_not_tell_a_block_of_more_than_two_axes():
    with pytest.raises(ValueError, match=r"Axes\(.*\)\} instead of \{'x': -2\}"):
        make_plan({"x": jnp.ones((3, 8, 8))}, "1x4@0.5", axes={"x": -2})


# What does not fit

STRADDLING = {
    "conv_stem": {"kernel": jnp.ones((3, 3, 3, 18))},
    "body": {"kernel": jnp.ones((5, 8))},
    "head": {"kernel": jnp.ones((8, 10))},
}


def test_all_leaves_whose_outputs_do_not_divide_are_named_with_the_way_out():
    with pytest.raises(ValueError, match="do not divide into whole groups or blocks") as error:
        make_plan(STRADDLING, "1x4@0.5")
    message = str(error.value)
    assert "conv_stem/kernel (3, 3, 3, 18): 18 outputs are not a multiple of 4" in message
    assert "head/kernel (8, 10): 10 outputs are not a multiple of 4 (axes -2 x -1)" in message
    assert "body" not in message  # Any number of inputs will do.
    assert 'on_indivisible="dense"' in message
    plan = make_plan(STRADDLING, "1x4@0.5", on_indivisible="dense")
    assert set(plan) == {"body/kernel"}
    assert plan.dense["head/kernel"] == "10 outputs are not a multiple of 4"
    mixed = make_plan(STRADDLING, "1x4@0.5", rules={"head": "2:4", "conv_stem": "1x6@0.5"})
    assert {name: str(leaf.pattern) for name, leaf in mixed.items()} == {
        "body/kernel": "1x4@0.5",
        "head/kernel": "2:4",
        "conv_stem/kernel": "1x6@0.5",
    }


# What stays


@pytest.mark.parametrize("pattern", ["1x4@0.55", "1x4@0.55/layer", "1x8@0.29", "1x2@0"])
def test_what_a_plan_and_a_cost_say_stays_is_what_pruning_keeps(pattern):
    params = {
        "conv": {"kernel": jax.random.normal(KEY, (3, 3, 7, 16))},
        "stack": {"kernel": jax.random.normal(KEY, (3, 5, 8)), "bias": jnp.ones((3, 8))},
    }
    plan = make_plan(params, pattern)
    kept = {name: int(mask.sum()) for name, mask in nmjax.compute_masks(params, plan).items()}
    assert {name: leaf.kept for name, leaf in plan.items()} == kept

    def forward(params, x):
        return jax.lax.conv(x, params["conv"]["kernel"].transpose(3, 2, 0, 1), (1, 1), "VALID")

    table = nmjax.cost(forward, params, jnp.ones((1, 7, 5, 5)), plan=plan)
    assert {name: table.leaves[name].weights_kept for name in plan} == kept
    assert table.leaves["conv/kernel"].macs_kept == 9 * kept["conv/kernel"]


def test_the_table_shows_blocks():
    plan = make_plan({"conv": {"kernel": jnp.ones((3, 3, 8, 16))}}, "1x4@0.5")
    line = str(plan).split("\n")[2]
    assert line.split() == [
        "conv/kernel",
        "3x3x8x16",
        "1x4@0.5",
        *("-2", "x", "-1", "known", "layer", "1,152", "576"),
    ]


def test_a_score_of_weights_is_summed_over_each_block():
    w = jax.random.normal(KEY, (10, 8))
    plan = make_plan({"w": w}, "1x4@0.5", score=jnp.square)
    mask = nmjax.compute_masks({"w": w}, plan)["w"]
    np.testing.assert_array_equal(mask, nmjax.block_mask(w, 4, 0.5, "l2"))
    assert (mask != nmjax.block_mask(w, 4, 0.5, "l1")).any()
