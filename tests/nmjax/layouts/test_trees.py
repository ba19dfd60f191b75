"""Layouts of whole trees: what names and siblings decide, and what they leave open."""

import pytest

from nmjax.layouts import Axes, Unknown, layouts

DENSE = Axes((-2,), (-1,))
LINEAR = Axes((-1,), (-2,))
CONV_OUT_IN = Axes((-3,), (-4,), (-2, -1))


def found(name, shape, **siblings):
    shapes = {name: shape, **{k.replace("__", "/"): v for k, v in siblings.items()}}
    return layouts(shapes)[name]


def is_unknown(outcome, *words):
    return isinstance(outcome, Unknown) and all(word in outcome.reason for word in words)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("Dense_0/bias", (4,), "bias"),
        ("query/bias", (4, 8), "bias"),
        ("lstm/recurrent_bias", (4, 8), "bias"),
        ("linear/b", (4,), "bias"),
        ("rnn.bias_ih_l0", (4,), "bias"),
        ("query/bias/value", (4, 8), "bias"),
        ("h.0.attn.bias", (1, 1, 32, 32), "bias"),
        ("LayerNorm_0/scale", (8,), "normalization"),
        ("blocks/LayerNorm_0/scale", (12, 8), "normalization"),
        ("key_ln/scale", (12, 8), "normalization"),
        ("blocks/norm/weight", (12, 8), "normalization"),
        ("blocks/ln_1/weight", (12, 8), "normalization"),
        ("bn1.running_mean", (12, 8), "normalization"),
        ("batch_stats/BatchNorm_0/mean", (8,), "normalization"),
        ("Embed_0/embedding", (100, 8), "embedding"),
        ("embed/embeddings", (100, 8), "embedding"),
        ("embed/embedding/value", (100, 8), "embedding"),
        ("pos_embedding", (1, 64, 8), "embedding"),
        ("relpos_bias/rel_embedding", (4, 32), "embedding"),
        ("attn/relative_position_bias_table", (168, 4), "embedding"),
        ("embed/weight", (100, 8), "embedding"),
        ("model.embed_tokens.weight", (100, 8), "embedding"),
        ("transformer/wte/weight", (100, 8), "embedding"),
        ("transformer/wpe/weight", (100, 8), "embedding"),
        ("shared/weight", (100, 8), "embedding"),
        ("SelfAttention/relative_attention_bias/weight", (32, 8), "embedding"),
        ("position_bias/weight", (32, 8), "embedding"),
        ("user_table.weight", (100, 8), "embedding"),
        ("vq.codebook.weight", (100, 8), "embedding"),
        ("tok/weight", (100, 8), "embedding"),
        ("token_type.weight", (100, 8), "embedding"),
        ("word/weight", (100, 8), "embedding"),
        ("src_vocab/weight", (100, 8), "embedding"),
        ("user/weight", (100, 8), "embedding"),
        ("item_id.weight", (100, 8), "embedding"),
        ("codes/weight", (100, 8), "embedding"),
        ("rel/weight", (100, 8), "embedding"),
        ("model/E/weight", (100, 8), "embedding"),
        ("pe/weight", (100, 8), "embedding"),
        ("table/weight", (100, 8), "embedding"),
        ("lookup/weight", (100, 8), "embedding"),
        ("vq.codebook_1.weight", (100, 8), "embedding"),
        ("positions/weight", (100, 8), "embedding"),
        ("cls_token", (1, 1, 8), "1-D"),
        ("gain", (8, 1, 1), "1-D"),
        ("attn/relative_position_index", (49, 49), "indices or mask"),
        ("Conv_0/kernel", (3, 3, 1, 8), "one input per output"),
        ("depthwise/kernel", (3, 3, 1, 8), "one input per output"),
        ("depthwise_conv/kernel", (3, 3, 8, 1), "one input per output"),
        ("temperature", (), "0-D"),
        ("Dense_0/kernel", (8,), "1-D"),
        ("lora/q/lora_a", (8, 4), "low-rank adapter"),
        ("q_proj.lora_A.default.weight", (4, 8), "low-rank adapter"),
        ("q/w_lora_b", (4, 2, 8), "low-rank adapter"),
        ("opt_state/0/mu/Dense_0/kernel", (8, 4), "optimizer state"),
        ("state/param_states/Dense_0/kernel/v", (8, 4), "optimizer state"),
    ],
)
def test_why_a_leaf_stays_dense(name, shape, reason):
    assert found(name, shape) == reason


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("kernel", (8, 4)),
        ("Dense_0/kernel", (8, 8)),
        ("mlp/~/linear_0/w", (8, 4)),
        ("layers/0/kernel/value", (8, 4)),
        ("params/params/Dense_0/kernel", (8, 4)),
        ("embed/kernel", (8, 4)),
    ],
)
def test_matrices_of_flax_and_haiku(name, shape):
    assert found(name, shape) == DENSE


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("fc.weight", None),
        ("0.weight", (8,)),
        ("sentence_embedder/encoder/layer/0/attention/query/weight", None),
        ("text_embedder/output/dense/weight", (8,)),
        ("time_embed/0/weight", (8,)),
        ("time_embed/weight", (8,)),
        ("q_proj.base_layer.weight", None),
        ("position_wise.weight", None),
        ("positionwise/weight", None),
        ("decode/weight", None),
        ("word_proj.weight", None),
        ("model/we/weight", None),
        ("user/weight", (8,)),
    ],
)
def test_matrices_of_pytorch(name, bias):
    shapes = {name: (8, 4)} | ({name.replace("weight", "bias"): bias} if bias else {})
    assert layouts(shapes)[name] == LINEAR


@pytest.mark.parametrize("name", ["conv1", "downsample.0", "features.conv.0", "patch_embed.proj"])
def test_convolutions_without_a_bias_known_by_name(name):
    shapes = {f"{name}.weight": (8, 4, 3, 3), "bn1.weight": (8,), "downsample.1.weight": (8,)}
    shapes |= {"features.conv.1.weight": (8,), "patch_embed.norm.weight": (8,)}
    assert layouts(shapes)[f"{name}.weight"] == CONV_OUT_IN
    # Or 1-D convolutions in a stack: nothing has a single axis.
    assert is_unknown(found(f"{name}.weight", (8, 4, 3, 3)))


@pytest.mark.parametrize(
    "name", ["Conv_0", "conv2_d", "block/Conv_0", "downsample_conv", "patch_embeddings/projection"]
)
def test_kernels_of_convolutions_without_a_bias_known_by_name(name):
    assert found(f"{name}/kernel", (3, 3, 8, 4)) == Axes((-2,), (-1,), (-4, -3))
    assert found(f"{name}/kernel", (3, 8, 4)) == Axes((-2,), (-1,), None)
    assert is_unknown(found(f"{name}/kernel", (3, 3, 8, 1)))


@pytest.mark.parametrize(
    "name",
    [
        "ConvTranspose_0",
        "conv2_d_transpose",
        "deconv",
        "upconv1",
        "up_conv",
        "depthwise_conv",
        "ConvLocal_0",
        "separable_conv2d",
        "layer",
        "layers/3",
        "proj",
    ],
)
@pytest.mark.parametrize("leaf", ["kernel", "w", "weight"])
def test_names_that_do_not_say_convolution(name, leaf):
    shapes = {f"{name}/{leaf}": (3, 3, 8, 4), "norm/scale": (4,)}
    assert is_unknown(layouts(shapes)[f"{name}/{leaf}"])


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("q_proj/w", (64, 8, 16), ["without a bias"]),
        ("o_proj/kernel", (8, 16, 64), ["without a bias", "(in, in, out)"]),
        ("attn_vec_einsum/w", (8, 16, 64), ["einsum"]),
        ("layers/Dense_0/kernel", (16, 8, 16), ["a stack of layers"]),
        ("wi_0/kernel", (16, 8, 16), []),
        ("qkv/kernel", (64, 3, 8, 8), []),
        ("experts/weight", (8, 32, 64), []),
        ("layers.0.experts.gate_up_proj", (8, 32, 64), ["gate_up_proj"]),
        ("0", (16, 4), ["'0'"]),
        ("lstm_cell/recurrent_kernel", (4, 16), ["recurrent_kernel"]),
        ("tokens/mix", (16, 16), []),
        ("unembedding", (16, 4), ["look-up"]),
        ("embed_out.weight", (100, 16), ["look-up"]),
        ("pos_proj.weight", (16, 16), ["look-up"]),
        ("embed_tokens.0.weight", (100, 16), ["look-up"]),
        ("users.0.weight", (100, 16), ["look-up"]),
        ("E", (100, 16), ["'E'"]),
        ("user", (100, 16), ["'user'"]),
        ("ssm/B", (16, 64), ["'B'"]),
        ("rnn.weight_ih", (3, 16, 4), ["stack"]),
        ("fc.weight_v", (4, 16), ["derived"]),
        ("fc.weight_orig", (4, 16), ["parametrization"]),
        ("norm1_proj.weight", (4, 16), ["normalization"]),
        ("embedder/w", (100, 16), ["look-up"]),
    ],
)
def test_what_stays_open_without_a_bias(name, shape, words):
    assert is_unknown(found(name, shape), *words)


def test_a_bias_that_fits_nothing():
    assert is_unknown(found("a/kernel", (8, 4), a__bias=(8,)), "(8,)", "fits no known layer")
    assert is_unknown(found("a/weight", (8, 4), a__bias=(4,)), "(4,)")
    assert is_unknown(found("a/kernel", (3, 3, 8, 4), a__bias=(5,)), "(5,)")


@pytest.mark.parametrize("leaf", ["kernel", "theta"])
def test_parametrizations_of_leaves_that_pytorch_does_not_have(leaf):
    shapes = {
        f"a.parametrizations.{leaf}.original{i}": shape for i, shape in ((0, (4, 1)), (1, (4, 8)))
    }
    outcomes = layouts(shapes)
    assert is_unknown(outcomes[f"a.parametrizations.{leaf}.original1"])
    gain = outcomes[f"a.parametrizations.{leaf}.original0"]
    assert gain == "gain of a weight normalization"


def test_a_norm_that_follows_but_does_not_fit_says_nothing():
    shapes = {"b.0.weight": (8, 4, 3, 3), "b.1.weight": (5,), "b.1.bias": (5,), "c.weight": (8, 8)}
    outcomes = layouts(shapes)
    assert is_unknown(outcomes["b.0.weight"], "without a bias")
    assert outcomes["c.weight"] == LINEAR


def test_a_bias_that_fits_several_layers():
    outcome = found("a/kernel", (3, 8, 4), a__bias=(4,))
    assert is_unknown(outcome, "a convolution (tap, in, out)", "a dense layer (in, in, out)")
    assert is_unknown(found("a/kernel", (8, 8, 16), a__bias=(8, 16)), "(stack, in, out)")


@pytest.mark.parametrize("leaf", ["kernel", "weight"])
def test_a_contradiction_leaves_all_leaves_open_that_nothing_corroborates(leaf):
    inputs, outputs = ((8, 4), (4,)) if leaf == "kernel" else ((4, 8), (4,))
    shapes = {
        f"odd/{leaf}": inputs[::-1],
        "odd/bias": outputs,
        f"plain/{leaf}": inputs,
        "plain/bias": outputs,
        f"square/{leaf}": (4, 4),
        "square/bias": (4,),
        f"no_bias/{leaf}": inputs,
    }
    outcomes = layouts(shapes)
    assert is_unknown(outcomes[f"odd/{leaf}"], "fits no known layer")
    assert is_unknown(outcomes[f"square/{leaf}"], f"odd/{leaf}", "contradicts")
    assert is_unknown(outcomes[f"no_bias/{leaf}"], f"odd/{leaf}")
    assert outcomes[f"plain/{leaf}"] == (DENSE if leaf == "kernel" else LINEAR)
    assert outcomes["plain/bias"] == "bias"
    # Leaves of another name belong to other layers.
    other = "weight" if leaf == "kernel" else "kernel"
    assert isinstance(layouts({**shapes, f"b/{other}": (8, 4)})[f"b/{other}"], Axes)


def attention(front=(), behind=False, dims=(16, 4, 8), key_heads=4):
    """Shapes of query, key, value, and out: stacked in front of the inputs, or behind them."""
    inputs, heads, size = dims
    cores = dict.fromkeys(("key", "value"), (inputs, key_heads, size))
    cores = {"query": (inputs, heads, size), **cores, "out": (heads, size, inputs)}
    return {
        f"a/{name}/kernel": (core[0], *front, *core[1:]) if behind else (*front, *core)
        for name, core in cores.items()
    }


@pytest.mark.parametrize("front", [(), (12,), (2, 12)])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attention_behind_axes_in_front(front, key_heads):
    outcomes = layouts(attention(front, key_heads=key_heads))
    for name in ("query", "key", "value"):
        assert outcomes[f"a/{name}/kernel"] == Axes((-3,), (-2, -1))
    assert outcomes["a/out/kernel"] == Axes((-3, -2), (-1,))


def test_attention_with_layers_on_axis_1():
    outcomes = layouts(attention((12,), behind=True))
    for name in ("query", "key", "value"):
        assert outcomes[f"a/{name}/kernel"] == Axes((-4,), (-2, -1))
    assert outcomes["a/out/kernel"] == Axes((-4, -2), (-1,))


def test_attention_whose_sizes_fit_several_ways():
    assert all(map(is_unknown, layouts(attention((4,), dims=(4, 4, 4))).values()))
    # As many inputs as heads: four convolutions with filters of that size look the same.
    assert all(map(is_unknown, layouts(attention(dims=(4, 4, 8))).values()))


@pytest.mark.parametrize("missing", ["query", "key", "value", "out"])
def test_attention_needs_out_and_one_other(missing):
    shapes = attention()
    expected = layouts(shapes)
    del shapes[f"a/{missing}/kernel"]
    if missing == "out":
        assert all(map(is_unknown, layouts(shapes).values()))
    else:
        assert layouts(shapes) == {name: expected[name] for name in shapes}


def test_only_queries_show_that_keys_and_values_have_fewer_heads():
    shapes = attention(key_heads=1)
    del shapes["a/query/kernel"]
    assert all(map(is_unknown, layouts(shapes).values()))


def test_attention_whose_heads_differ():
    shapes = attention() | {"a/out/kernel": (2, 8, 16)}
    assert all(map(is_unknown, layouts(shapes).values()))
    shapes = attention() | {"a/value/kernel": (16, 4, 6)}
    assert all(map(is_unknown, layouts(shapes).values()))


@pytest.mark.parametrize("shape", [(3, 3, 16, 16), (3, 16, 16), (1, 16, 16)])
def test_convolutions_with_names_of_attention(shape):
    shapes = {f"{n}/kernel": shape for n in ("query", "key", "value", "out")}
    assert all(map(is_unknown, layouts(shapes).values()))


def test_dense_layers_with_names_of_attention():
    shapes = {f"{n}/kernel": (16, 16) for n in ("query", "key", "value", "out")}
    assert set(layouts(shapes).values()) == {DENSE}


def gpt2(out_in, leaf, *, bias):
    """Shapes of a block of GPT-2."""
    sizes = {"attn/c_attn": (16, 48), "attn/c_proj": (16, 16), "mlp/c_fc": (16, 64)}
    shapes = {}
    for name, size in {**sizes, "mlp/c_proj": (64, 16)}.items():
        shapes[f"h/0/{name}/{leaf}"] = size[::-1] if out_in else size
        if bias:
            shapes[f"h/0/{name}/bias"] = size[1:]
    return shapes


@pytest.mark.parametrize("leaf", ["weight", "kernel"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_in", [True, False])
def test_gpt2_either_way_round(leaf, bias, out_in):
    outcomes = layouts(gpt2(out_in, leaf, bias=bias))
    matrices = {axes for name, axes in outcomes.items() if name.endswith(leaf)}
    assert matrices == {LINEAR if out_in else DENSE}


def test_gpt2_that_shows_no_order_or_both():
    assert is_unknown(found("c_proj/weight", (16, 16)), "GPT-2")
    mixed = gpt2(True, "weight", bias=True) | {"x/c_fc/weight": (16, 64), "x/c_fc/bias": (64,)}
    matrices = [axes for name, axes in layouts(mixed).items() if name.endswith("weight")]
    assert all(is_unknown(axes, "GPT-2") for axes in matrices)
    assert is_unknown(found("c_fc/weight", (16, 64), c_fc__bias=(5,)))
    assert is_unknown(found("c_fc/kernel", (12, 16, 64), c_fc__bias=(12, 64)), "stack")


def test_keras_gru_has_two_rows_of_biases():
    assert found("gru/kernel", (8, 12), gru__bias=(2, 12)) == DENSE


def test_depthwise_convolutions_of_keras_do_not_contradict():
    shapes = {"dw/kernel": (3, 3, 8, 2), "dw/bias": (16,), "top/kernel": (16, 16)}
    assert layouts(shapes) == {
        "dw/kernel": "one input per output",
        "dw/bias": "bias",
        "top/kernel": DENSE,
    }


@pytest.mark.parametrize("leaf", ["weight", "kernel"])
def test_a_transposed_convolution_in_the_tree_makes_names_doubtful(leaf):
    """A user who calls one of them conv1 may call the next one conv2."""
    square = (3, 3, 8, 8) if leaf == "kernel" else (8, 8, 3, 3)
    transposed = (3, 3, 8, 16) if leaf == "kernel" else (16, 8, 3, 3)
    tree = {f"conv1/{leaf}": transposed, "conv1/bias": (8,), f"conv2/{leaf}": square}
    outcome = layouts({**tree, "conv2/bias": (8,)})[f"conv2/{leaf}"]
    assert is_unknown(outcome, f"conv1/{leaf} is a transposed convolution")
    alone = layouts({f"conv2/{leaf}": square, "conv2/bias": (8,)})[f"conv2/{leaf}"]
    assert isinstance(alone, Axes)


def test_square_convolutions_of_one_tap():
    square = {"0.weight": (16, 16, 1, 1), "0.bias": (16,)}
    assert layouts(square)["0.weight"] == Axes((-3,), (-4,), (-2, -1))
    normalized = {"0.weight": (16, 16, 1, 1), "1.weight": (16,), "1.bias": (16,)}
    normalized |= {"1.running_mean": (16,), "1.running_var": (16,)}
    assert layouts(normalized)["0.weight"] == Axes((-3,), (-4,), (-2, -1))
    transposed = {"1.weight": (16, 8, 3, 3), "1.bias": (8,)}
    assert is_unknown(layouts({**square, **transposed})["0.weight"], "single tap")
    assert is_unknown(
        layouts({"0.weight": (16, 16, 3, 3), "0.bias": (16,)})["0.weight"], "could be"
    )


@pytest.mark.parametrize(
    "name", ["conv_t", "convt", "convtr", "tconv", "t_conv", "dconv", "inv_conv"]
)
def test_names_of_transposed_convolutions_are_ambiguous(name):
    outcome = layouts({f"{name}.weight": (8, 8, 3, 3), f"{name}.bias": (8,)})[f"{name}.weight"]
    assert is_unknown(outcome, "transposed")
