"""Multiply-adds counted by hand and by XLA, for every way in which a weight reaches a product."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import nmjax
from nmjax import cost, linen
from nmjax.trees.leaves import named_leaves

KEY = jax.random.key(0)
MATRIX = {"w": jax.ShapeDtypeStruct((16, 16), jnp.float32)}
ROWS = jax.ShapeDtypeStruct((64, 16), jnp.float32)  # More activations than weights.
ONE_PRODUCT = 64 * 16 * 16


def macs(table):
    """The multiply-adds of the leaves that have some."""
    return {name: leaf.macs for name, leaf in table.leaves.items() if leaf.macs}


def xla_macs(module, *inputs, **kwargs):
    """Half of the floating point operations that XLA counts in the compiled forward pass."""
    variables = module.init(KEY, *inputs, **kwargs)
    forward = jax.jit(lambda variables, *inputs: module.apply(variables, *inputs, **kwargs))
    return forward.lower(variables, *inputs).compile().cost_analysis()["flops"] / 2


# Networks


def test_mlp():
    mlp = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(8)])
    table = linen.cost(mlp, "2:4", (64, 16))
    assert macs(table) == {
        "layers_0/kernel": 64 * 16 * 32,
        "layers_2/kernel": 64 * 32 * 8,
    }
    assert table.other_macs == 0
    total = table.total
    assert total.macs_kept == total.macs // 2
    assert total.weights == 16 * 32 + 32 + 32 * 8 + 8
    assert total.weights_kept == 16 * 32 // 2 + 32 + 32 * 8 // 2 + 8


class SmallResNet(nn.Module):
    """Convolutions with stride, groups and a shortcut; nothing is padded, so XLA counts all."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (3, 3), strides=2, padding="VALID", name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        y = nn.Conv(32, (1, 1), name="body_1")(x)
        y = nn.Conv(32, (3, 3), padding="VALID", feature_group_count=4, name="body_2")(y)
        x = nn.Conv(32, (1, 1), use_bias=False, name="shortcut")(x[:, 1:-1, 1:-1])
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x + y))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


RESNET_MACS = {
    "stem/kernel": 2 * 8 * 8 * 16 * (3 * 3 * 4),
    "body_1/kernel": 2 * 8 * 8 * 32 * 16,
    "body_2/kernel": 2 * 6 * 6 * 32 * (3 * 3 * 32 // 4),
    "shortcut/kernel": 2 * 6 * 6 * 32 * 16,
    "head/kernel": 2 * 32 * 10,
}


@pytest.mark.parametrize("train", [False, True])
def test_a_small_resnet(train):
    table = linen.cost(SmallResNet(), "2:4", (2, 17, 17, 4), train=train)
    assert macs(table) == RESNET_MACS
    assert table.other_macs == 0


def test_a_plan_reduces_only_what_it_names():
    plan = linen.make_plan(
        SmallResNet(), "2:4", (2, 17, 17, 4), exclude="stem", rules={"head": "1:8"}
    )
    kept = {
        name: leaf.macs_kept
        for name, leaf in linen.cost(SmallResNet(), plan, (2, 17, 17, 4)).leaves.items()
        if leaf.macs
    }
    share = {"stem/kernel": 1, "head/kernel": 8}
    assert kept == {name: count // share.get(name, 2) for name, count in RESNET_MACS.items()}


@pytest.mark.optimized
@pytest.mark.slow
def test_xla_counts_the_same_for_the_resnet():
    # XLA also counts biases, normalizations and the mean: 6 in 100 here.
    counted = linen.cost(SmallResNet(), None, (2, 17, 17, 4)).total.macs
    assert counted <= xla_macs(SmallResNet(), jnp.ones((2, 17, 17, 4))) < 1.1 * counted


def test_attention():
    batch, tokens, width, heads = 2, 5, 16, 4
    attention = nn.MultiHeadDotProductAttention(heads)
    table = linen.cost(attention, "2:4", (batch, tokens, width))
    projection = batch * tokens * width * width
    assert macs(table) == {f"{p}/kernel": projection for p in ("query", "key", "value", "out")}
    # Scores and their products with the values: tokens x tokens x head size for each head.
    assert table.other_macs == 2 * batch * tokens * tokens * width
    assert table.total.macs_kept == 4 * projection // 2 + table.other_macs


@pytest.mark.optimized
def test_xla_counts_the_same_for_attention():
    # XLA also counts the softmax: 3 in 100 here.
    x = jnp.ones((2, 64, 64))
    counted = linen.cost(nn.MultiHeadDotProductAttention(4), None, x).total.macs
    assert counted <= xla_macs(nn.MultiHeadDotProductAttention(4), x) < 1.1 * counted


@pytest.mark.optimized
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv(8, (3,), padding="VALID"),
        nn.Conv(8, (5,), strides=3, padding="VALID"),
        nn.Conv(8, (3,), padding="VALID", kernel_dilation=2),
        nn.Conv(8, (3,), padding="VALID", feature_group_count=4),
        nn.Conv(8, (3,), padding="VALID", feature_group_count=8),
    ],
)
def test_xla_counts_the_same_for_convolutions(conv):
    x = jnp.ones((2, 33, 8), jnp.float32)
    outputs = jax.eval_shape(conv.init_with_output, KEY, x)[0].size
    counted = linen.cost(conv, None, x).leaves["kernel"].macs
    assert counted == xla_macs(conv, x) - outputs / 2  # Adding the bias is half a multiply-add.


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_a_transposed_convolution_does_not_count_the_zeros_that_it_sets(transpose_kernel):
    conv = nn.ConvTranspose(4, (2, 2), strides=(2, 2), transpose_kernel=transpose_kernel)
    table = linen.cost(conv, None, (2, 6, 6, 8))
    # Every input meets every tap once.
    assert macs(table) == {"kernel": 2 * 6 * 6 * 8 * (2 * 2 * 4)}


# Who owns a product


def test_scales_of_norms_do_not_capture_activations():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm(name="before")(x)
            x = nn.Dense(16, name="dense")(x)
            return nn.Dense(4, name="head")(nn.RMSNorm(name="after")(x) + x)

    table = linen.cost(Normed(), "2:4", ROWS)
    assert macs(table) == {"dense/kernel": ONE_PRODUCT, "head/kernel": 64 * 16 * 4}


def test_scales_on_queries_and_keys_do_not_capture_attention_scores():
    attention = nn.MultiHeadDotProductAttention(2, normalize_qk=True)
    table = linen.cost(attention, "2:4", (1, 32, 8))
    assert macs(table) == {f"{p}/kernel": 32 * 8 * 8 for p in ("query", "key", "value", "out")}
    assert table.other_macs == 2 * 32 * 32 * 8


def test_embeddings_are_looked_up_for_nothing_and_tied_outputs_are_charged_to_them():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(100, 16, name="embed")
            return embed.attend(nn.Dense(16, name="dense")(embed(tokens)))

    table = linen.cost(Tied(), "2:4", jnp.zeros((1, 64), int))
    assert macs(table) == {"embed/embedding": 64 * 16 * 100, "dense/kernel": ONE_PRODUCT}


def test_a_product_of_two_activations_belongs_to_nobody():
    table = cost(lambda p, x: (x @ p["w"]) @ x.T, MATRIX, ROWS)
    assert macs(table) == {"w": ONE_PRODUCT}
    assert table.other_macs == 64 * 16 * 64


def test_state_beside_the_parameters_counts_as_activation():
    table = cost(lambda p, mean, x: (x - mean) @ p["w"] * mean, MATRIX, ROWS, ROWS)
    assert macs(table) == {"w": ONE_PRODUCT}


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.astype(jnp.bfloat16).astype(w.dtype),
        lambda w: w.T,
        lambda w: w.reshape(2, 8, 16).reshape(16, 16),
        lambda w: w * 2.0 - w.mean(),
        lambda w: w / jnp.linalg.norm(w, axis=0, keepdims=True),
        lambda w: jnp.where(jnp.ones((16, 16), bool), w, 0),
        jax.jit(lambda w: w + 1),
        jax.checkpoint(lambda w: w + 1),
        lambda w: lax.cond(True, lambda w: w, lambda w: 2 * w, w),
    ],
)
def test_a_weight_is_known_however_it_was_changed_before(change):
    table = cost(lambda p, x: jnp.tanh(x) @ change(p["w"]) @ change(p["w"]), MATRIX, ROWS)
    assert macs(table) == {"w": 2 * ONE_PRODUCT}
    assert table.other_macs == 0


def test_layers_out_of_one_stacked_leaf():
    stacked = {"w": jax.ShapeDtypeStruct((3, 16, 16), jnp.float32)}
    table = cost(lambda p, x: x @ p["w"][0] @ p["w"][1] @ p["w"][2], stacked, ROWS)
    assert macs(table) == {"w": 3 * ONE_PRODUCT}


@pytest.mark.parametrize("lambda_w", [None, 2e-4])
def test_under_sparsify_with_its_own_gradient_rules(lambda_w):
    plan = nmjax.make_plan(MATRIX, "2:4")

    def forward(params, x):
        return x @ nmjax.sparsify(params, plan, lambda_w=lambda_w)["w"]

    table = cost(forward, MATRIX, ROWS, plan=plan)
    assert (table.total.macs, table.total.macs_kept) == (ONE_PRODUCT, ONE_PRODUCT // 2)
    assert table.other_macs == 0


def test_under_prune_with_masks_closed_over():
    params = {"w": jax.random.normal(KEY, (16, 16))}
    plan = nmjax.make_plan(params, "2:4")
    masks = nmjax.compute_masks(params, plan)
    table = cost(lambda p, x: x @ nmjax.prune(p, plan, masks)["w"], params, ROWS, plan=plan)
    assert macs(table) == {"w": ONE_PRODUCT}


def test_a_sparse_module_costs_what_the_dense_one_costs():
    assert linen.cost(linen.sparsify(SmallResNet(), "2:4"), "2:4", (2, 17, 17, 4)) == linen.cost(
        SmallResNet(), "2:4", (2, 17, 17, 4)
    )


# How often


def test_shared_weights_count_for_every_use():
    table = cost(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], MATRIX, ROWS, plan=None)
    assert macs(table) == {"w": 2 * ONE_PRODUCT}
    assert table.total.weights == 256


def recurrent(p, x):
    return lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, length=5)[0]


def rows_one_by_one(p, x):
    return lax.map(lambda row: row @ p["w"], x)


def recurrent_from_nothing(p, x):
    step = lambda h, row: (jnp.tanh(h @ p["w"] + row), None)  # noqa: E731
    return lax.scan(step, jnp.zeros(16), x)[0]


def counted_loop(p, x):
    return lax.fori_loop(0, 5, lambda _, h: jnp.tanh(h @ p["w"]), x)


def nested_loops(p, x):
    inner = lambda h, _: (h @ p["w"], None)  # noqa: E731
    outer = lambda h, _: (lax.scan(inner, h, length=2)[0], None)  # noqa: E731
    return lax.scan(outer, x, length=3)[0]


@pytest.mark.parametrize(
    ("forward", "passes"),
    [
        (recurrent, 5),
        (rows_one_by_one, 1),
        (recurrent_from_nothing, 1),
        (counted_loop, 5),
        (nested_loops, 6),
        (lambda p, x: jax.checkpoint(lambda p, x: x @ p["w"])(p, x), 1),
        (lambda p, x: jax.vmap(lambda x: x @ p["w"])(x), 1),
        (lambda p, x: jax.nn.gelu(jax.jit(jnp.dot)(x, p["w"])), 1),
        (lambda p, x: lax.cond(x.sum() > 0, lambda: x, lambda: x @ p["w"]), 1),
        (lambda p, x: lax.while_loop(lambda h: h.sum() > 0, lambda h: h @ p["w"], x), 1),
    ],
)
def test_loops_calls_and_branches(forward, passes):
    table = cost(forward, MATRIX, ROWS)
    assert macs(table) == {"w": passes * ONE_PRODUCT}
    assert table.other_macs == 0


def test_a_learned_state_to_begin_with_does_not_capture_what_comes_of_it():
    params = {**MATRIX, "start": ROWS}  # Larger than the matrix.

    def forward(p, x):
        steps = jnp.stack([x] * 5)
        return lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), None), p["start"], steps)[0]

    assert macs(cost(forward, params, ROWS)) == {"w": 5 * ONE_PRODUCT}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(16)(nn.LayerNorm()(x))), None


@pytest.mark.parametrize("layer", [Layer, nn.remat(Layer)], ids=["plain", "remat"])
def test_scanned_linen_layers(layer):
    layers = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
    table = linen.cost(layers(), "2:4", ROWS, None)
    (name,) = macs(table)
    assert name.endswith("Dense_0/kernel")
    assert macs(table) == {name: 5 * ONE_PRODUCT}
    assert table.leaves[name].weights == 5 * 16 * 16
    assert table.total.macs_kept == 5 * ONE_PRODUCT // 2


def test_the_batch_counts():
    one, many = (linen.cost(nn.Dense(4), None, (batch, 8)).total.macs for batch in (1, 32))
    assert many == 32 * one == 32 * 32


# What one can pass


def test_inputs_as_shapes_arrays_and_abstract_values():
    by_shape = linen.cost(nn.Dense(4), "2:4", (64, 16))
    assert by_shape == linen.cost(nn.Dense(4), "2:4", jnp.ones((64, 16)))
    assert by_shape == linen.cost(nn.Dense(4), "2:4", ROWS)


def test_pattern_plan_and_none():
    params = jax.eval_shape(nn.Dense(4).init, KEY, ROWS)["params"]
    plan = nmjax.make_plan(params, "2:4")
    assert linen.cost(nn.Dense(4), "2:4", ROWS) == linen.cost(nn.Dense(4), plan, ROWS)
    assert linen.cost(nn.Dense(4), nmjax.NM(2, 4), ROWS) == linen.cost(nn.Dense(4), plan, ROWS)
    dense = linen.cost(nn.Dense(4), None, ROWS)
    assert dense.total.macs_kept == dense.total.macs
    assert {leaf.pattern for leaf in dense.leaves.values()} == {"dense"}


def test_a_carry_of_arrays_is_no_shape():
    carry = (jnp.ones((1, 8)), jnp.ones((1, 8)))
    table = linen.cost(nn.LSTMCell(8), "2:4", carry, (1, 8))
    assert table.total.macs == 8 * 8 * 8


def test_modules_that_draw_random_numbers():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x))
            return x + jax.random.normal(self.make_rng("noise"), x.shape)

    assert linen.cost(Noisy(), "2:4", (2, 8)).total.macs == 2 * 8 * 4


def test_numbers_among_the_parameters():
    table = cost(lambda p, x: x @ p["w"] * p["scale"], {**MATRIX, "scale": 2.0}, ROWS)
    assert table.leaves["scale"].weights == 1
    assert macs(table) == {"w": ONE_PRODUCT}


def test_inputs_closed_over_are_refused():
    x = jnp.ones((64, 16))
    with pytest.raises(ValueError, match="inputs as arguments"):
        cost(lambda p: x @ p["w"], MATRIX)


def test_a_plan_of_other_parameters():
    plan = nmjax.make_plan({"other": {"w": jnp.ones((8, 4))}}, "2:4")
    with pytest.raises(ValueError, match=r"leaves that params does not have: \['other/w'\]"):
        cost(lambda p, x: x @ p["w"], MATRIX, ROWS, plan=plan)


# What it shows


def test_weights_kept_are_what_pruning_keeps():
    params = SmallResNet().init(KEY, jnp.ones((2, 17, 17, 4)))["params"]
    plan = linen.make_plan(SmallResNet(), "1:4", (2, 17, 17, 4), exclude="head")
    table = linen.cost(SmallResNet(), plan, (2, 17, 17, 4))
    pruned = named_leaves(nmjax.prune(params, plan))
    for name, leaf in table.leaves.items():
        counted = (pruned[name] != 0).sum() if name in plan else pruned[name].size
        assert (leaf.weights, leaf.weights_kept) == (pruned[name].size, counted)


def test_the_table():
    table = linen.cost(nn.MultiHeadDotProductAttention(2, name="<a>"), "2:4", (1, 4, 8))
    lines = {line.split("  ")[0]: line.split() for line in str(table).split("\n")}
    assert lines["out/kernel"] == ["out/kernel", "2:4", "64", "32", "256", "128", "20.0%"]
    assert lines["out/bias"] == ["out/bias", "dense", "8", "8", "0", "0", "0.0%"]
    assert lines["(products of activations)"][3:] == ["0", "0", "256", "256", "20.0%"]
    assert lines["total"] == ["total", "288", "160", "1,280", "768", "100.0%"]
    assert len(str(table).split("\n")) == 2 + len(table.leaves) + 2
    assert table._repr_html_().count("<tr>") == 1 + len(table.leaves) + 2


def test_a_network_without_products_of_activations_has_no_row_for_them():
    assert "activations" not in str(linen.cost(nn.Dense(4), "2:4", (1, 8)))
