"""What the reader of a program says of products whose axes are known by construction.

Whole networks are compared with a numerical oracle in tests/nmjax/real_models.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import nmjax
from nmjax.layouts import Axes, Unknown
from nmjax.tracing.program import read_program

X = jax.ShapeDtypeStruct((2, 3, 16), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 3), jnp.int32)
DENSE, SWAPPED = Axes((-2,), (-1,)), Axes((-1,), (-2,))


def weight(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def axes_of(forward, params, *inputs):
    uses = read_program(forward, params, *inputs).uses
    return {name: each.axes() for name, each in uses.items()}


@given(st.data())
def test_any_einsum(data):
    """The letters say which axes are summed, kept, or shared with the activation."""
    letters = data.draw(st.permutations("abcdef"))
    counts = [
        data.draw(st.integers(0, 2)),
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 2)),
    ]
    batch, summed, kept = (
        letters[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))
    )
    of_weight = "".join(data.draw(st.permutations(batch + summed + kept)))
    of_x = "".join(data.draw(st.permutations([*batch, *summed, "x"])))
    result = "".join(data.draw(st.permutations([*batch, *kept, "x"])))
    sizes = {letter: data.draw(st.integers(2, 3)) for letter in letters} | {"x": 5}

    def forward(params, x):
        return jnp.einsum(f"{of_x},{of_weight}->{result}", x, params["w"])

    params = {"w": weight(*(sizes[letter] for letter in of_weight))}
    found = axes_of(forward, params, weight(*(sizes[letter] for letter in of_x)))["w"]
    negative = {letter: i - len(of_weight) for i, letter in enumerate(of_weight)}
    assert set(found.reduction) == {negative[letter] for letter in summed}
    assert set(found.output) == {negative[letter] for letter in kept}
    assert found.taps == ()
    assert list(found.reduction) == sorted(found.reduction)


def scanned(axis):
    def forward(params, x):
        layers = jnp.moveaxis(params["w"], axis, 0)
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, layers)[0]

    return forward


def conv(**settings):
    layer = nn.Conv(16, (3, 3), **settings)
    return lambda params, x: layer.apply({"params": {**params, "bias": jnp.zeros(16)}}, x)


def conv_transpose(params, x):
    layer = nn.ConvTranspose(6, (3, 3), strides=(2, 2), transpose_kernel=True, use_bias=False)
    return layer.apply({"params": params}, x)


def rnn(params, x):
    def step(h, x):
        return jnp.tanh(h @ params["h"] + x @ params["x"]), None

    return lax.scan(step, jnp.zeros((3, 8)), x)[0]


def weight_norm(params, x):
    norm = jnp.sqrt((params["v"] ** 2).sum(0))
    return x @ (params["v"] * (params["g"] / norm)[None])


def quantized(params, x):
    scale = jnp.abs(params["w"]).max(0) / 127
    w = jnp.clip(jnp.round(params["w"] / scale[None]), -127, 127).astype(jnp.int8)
    return (x.astype(jnp.int8) @ w).astype(jnp.float32) * scale[None, None]


def straight_through(params, x):
    w = params["w"]
    return x @ nmjax.prune_ste(w, nmjax.nm_mask(w, 2, 4))


def sharded(params, x):
    mesh = jax.sharding.AbstractMesh((2,), ("model",), (jax.sharding.AxisType.Auto,))
    spec = jax.P("model")
    product = jax.shard_map(
        lambda w, x: lax.psum(x @ w.reshape(-1, 2, 4).reshape(-1, 8), "model"),
        mesh=mesh,
        in_specs=(spec, jax.P(None, None, "model")),
        out_specs=jax.P(),
    )
    return product(params["w"], x)


IMAGE = weight(1, 4, 4, 8)
# name -> (forward, shapes of the weights, inputs, what each weight's axes are)
FOLLOWED = {
    "heads": (
        lambda p, x: jnp.einsum("btd,dnh->btnh", x, p["w"]),
        {"w": (16, 4, 8)},
        (X,),
        {"w": Axes((-3,), (-2, -1))},
    ),
    "back from heads": (
        lambda p, x: jnp.einsum("btnh,nhd->btd", x.reshape(2, 3, 2, 8), p["w"]),
        {"w": (2, 8, 5)},
        (X,),
        {"w": Axes((-3, -2), (-1,))},
    ),
    "stored as (out, in)": (lambda p, x: x @ p["w"].T, {"w": (48, 16)}, (X,), {"w": SWAPPED}),
    "stored flat": (
        lambda p, x: jnp.einsum("btd,dnh->btnh", x, p["w"].reshape(16, 4, 8)),
        {"w": (16, 32)},
        (X,),
        {"w": DENSE},
    ),
    "stacked on axis 0": (scanned(0), {"w": (8, 16, 16)}, (X,), {"w": DENSE}),
    "stacked on axis 1": (scanned(1), {"w": (16, 8, 16)}, (X,), {"w": Axes((-3,), (-1,))}),
    "stacked on axis 2": (scanned(2), {"w": (16, 16, 8)}, (X,), {"w": Axes((-3,), (-2,))}),
    "a loop over a stack": (
        lambda p, x: lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ p["w"][i]), x),
        {"w": (4, 16, 16)},
        (X,),
        {"w": DENSE},
    ),
    "while": (
        lambda p, x: lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ p["w"], x),
        {"w": (16, 16)},
        (X,),
        {"w": DENSE},
    ),
    "both branches": (
        lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p["a"], lambda: x @ p["b"].T),
        {"a": (16, 16), "b": (16, 16)},
        (X,),
        {"a": DENSE, "b": SWAPPED},
    ),
    "a state that starts as zeros": (
        rnn,
        {"h": (8, 8), "x": (16, 8)},
        (weight(5, 3, 16),),
        {"h": DENSE, "x": DENSE},
    ),
    "remat and jit": (
        lambda p, x: jax.checkpoint(jax.jit(jnp.matmul))(x, p["w"]),
        {"w": (16, 8)},
        (X,),
        {"w": DENSE},
    ),
    "vmap": (
        lambda p, x: jax.vmap(jnp.matmul, (None, 1))(x, p["w"]),
        {"w": (16, 4, 8)},
        (X,),
        {"w": Axes((-3,), (-2, -1))},
    ),
    "vmap of weights and inputs": (
        lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]),
        {"w": (2, 16, 8)},
        (X,),
        {"w": DENSE},
    ),
    "vmap of convolutions": (
        lambda p, x: jax.vmap(lambda k, x: conv()({"kernel": k}, x))(p["w"], x),
        {"w": (5, 3, 3, 8, 16)},
        (weight(5, 1, 4, 4, 8),),
        {"w": Axes((-2,), (-1,), (-4, -3))},
    ),
    "convolution": (
        conv(),
        {"kernel": (3, 3, 8, 16)},
        (IMAGE,),
        {"kernel": Axes((-2,), (-1,), (-4, -3))},
    ),
    "convolution in groups": (
        conv(feature_group_count=2),
        {"kernel": (3, 3, 4, 16)},
        (IMAGE,),
        {"kernel": Axes((-2,), (-1,), (-4, -3))},
    ),
    "dilated convolution": (
        conv(kernel_dilation=2),
        {"kernel": (3, 3, 8, 16)},
        (IMAGE,),
        {"kernel": Axes((-2,), (-1,), (-4, -3))},
    ),
    "convolution of a constant image": (
        lambda p, x: x + conv()(p, jnp.zeros((1, 4, 4, 8))),
        {"kernel": (3, 3, 8, 16)},
        (weight(1, 4, 4, 16),),
        {"kernel": Axes((-2,), (-1,), (-4, -3))},
    ),
    "depthwise convolution": (
        conv(feature_group_count=8),
        {"kernel": (3, 3, 1, 16)},
        (IMAGE,),
        {"kernel": "one input per output (depthwise)"},
    ),
    "one input channel": (
        conv(),
        {"kernel": (3, 3, 1, 16)},
        (weight(1, 4, 4, 1),),
        {"kernel": Axes((-2,), (-1,), (-4, -3))},
    ),
    "transposed convolution": (
        conv_transpose,
        {"kernel": (3, 3, 6, 8)},
        (IMAGE,),
        {"kernel": Axes((-1,), (-2,), (-4, -3))},
    ),
    "weight normalization": (
        weight_norm,
        {"v": (16, 8), "g": (8,)},
        (X,),
        {"v": DENSE, "g": "in no product: meets activations entry by entry"},
    ),
    "quantized": (quantized, {"w": (16, 8)}, (X,), {"w": DENSE}),
    "straight-through": (straight_through, {"w": (16, 8)}, (X,), {"w": DENSE}),
    "straight-through by hand": (
        lambda p, x: x @ (p["w"] + lax.stop_gradient(jnp.round(p["w"] * 8) / 8 - p["w"])),
        {"w": (16, 8)},
        (X,),
        {"w": DENSE},
    ),
    "shard_map": (sharded, {"w": (16, 8)}, (X,), {"w": DENSE}),
    "several weights at once": (
        lambda p, x: x @ jnp.concatenate([p["q"], p["k"].T], axis=1),
        {"q": (16, 4), "k": (8, 16)},
        (X,),
        {"q": DENSE, "k": SWAPPED},
    ),
    "experts": (
        lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]),
        {"w": (2, 16, 5)},
        (X,),
        {"w": DENSE},
    ),
    "experts that the input picks": (
        lambda p, x, i: jnp.einsum("btd,btdf->btf", x, p["w"][i]),
        {"w": (8, 16, 5)},
        (X, TOKENS),
        {"w": DENSE},
    ),
    "inputs that the input picks": (
        lambda p, x, i: x @ lax.dynamic_slice_in_dim(p["w"], i, 16),
        {"w": (64, 8)},
        (X, jax.ShapeDtypeStruct((), jnp.int32)),
        {"w": DENSE},
    ),
    "ragged experts": (
        lambda p, x: lax.ragged_dot(x.reshape(6, 16), p["w"], jnp.array([2, 4])),
        {"w": (2, 16, 5)},
        (X,),
        {"w": DENSE},
    ),
    "experts in a list": (
        lambda p, x, i: jnp.einsum("bti,btio->bto", x, jnp.stack([p["a"], p["b"]])[i]),
        {"a": (16, 5), "b": (16, 5)},
        (X, TOKENS),
        {"a": DENSE, "b": DENSE},
    ),
    "modulated in a batch": (
        lambda p, x, s: jnp.einsum("bti,bio->bto", x, p["w"][None] * s[:, :, None]),
        {"w": (16, 8)},
        (X, weight(2, 16)),
        {"w": DENSE},
    ),
    "chosen by the input": (
        lambda p, x: x @ jnp.where(x.sum() > 0, jnp.round(p["w"]), p["w"]),
        {"w": (16, 8)},
        (X,),
        {"w": DENSE},
    ),
    "weights dropped by noise": (
        lambda p, x, key: x @ jnp.where(jax.random.bernoulli(key, 0.5, (16, 8)), p["w"], 0),
        {"w": (16, 8)},
        (X, jax.random.key(0)),
        {"w": DENSE},
    ),
    "reordered by constants": (
        lambda p, x: x @ p["w"][jnp.array([*range(8, 16), *range(8)])],
        {"w": (16, 8)},
        (X,),
        {"w": DENSE},
    ),
    "clipped": (lambda p, x: x @ jnp.clip(p["w"], -1, 1), {"w": (16, 8)}, (X,), {"w": DENSE}),
    "gate of queries": (
        lambda p, x: jnp.einsum("bqd,bkd->bqk", x * p["g"][None], x),
        {"g": (3, 16)},
        (X,),
        {"g": "in no product: meets activations entry by entry"},
    ),
    "gate of attention": (
        lambda p, x: (jnp.einsum("bqd,bkd->bqk", x, x) * p["g"][None]) @ x,
        {"g": (3, 3)},
        (X,),
        {"g": "in no product: meets activations entry by entry"},
    ),
    "bias of attention": (
        lambda p, x: jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x) + p["b"][None]) @ x,
        {"b": (3, 3)},
        (X,),
        {"b": "in no product: meets activations entry by entry"},
    ),
    "decay of a state": (
        lambda p, x: jnp.einsum("bld,dn->bldn", x, -jnp.exp(p["A_log"])),
        {"A_log": (16, 4)},
        (X,),
        {"A_log": "in no product: meets activations entry by entry"},
    ),
    "a history of scales": (
        lambda p, x, h: (x @ p["w"], h.at[0].set(jnp.abs(p["w"]).max())),
        {"w": (16, 8)},
        (X, weight(4)),
        {"w": DENSE},
    ),
    "tiled queries": (
        lambda p, x: jnp.tile(p["queries"][None], (2, 1, 1)) @ p["w"] @ x.mT,
        {"queries": (5, 16), "w": (16, 16)},
        (X,),
        {"queries": "in no product: meets activations entry by entry", "w": DENSE},
    ),
    "masked look-up by a product": (
        lambda p, i, m: (jax.nn.one_hot(i, 50) * m[..., None]) @ p["table"],
        {"table": (50, 16)},
        (TOKENS, weight(2, 3)),
        {"table": "embedding (a look-up table)"},
    ),
    "look-up by a comparison": (
        lambda p, i: jnp.where(i[..., None] == jnp.arange(50)[None, None], 1.0, 0.0) @ p["table"],
        {"table": (50, 16)},
        (TOKENS,),
        {"table": "embedding (a look-up table)"},
    ),
    "a comparison with one number": (
        lambda p, x: (x == 1).astype(jnp.float32) @ p["w"],
        {"w": (16, 8)},
        (X,),
        {"w": DENSE},
    ),
    "a flattened one-hot input": (
        lambda p, i: jax.nn.one_hot(i, 5).reshape(2, 15) @ p["w"],
        {"w": (15, 8)},
        (TOKENS,),
        {"w": DENSE},
    ),
    "scaled by the input": (
        lambda p, x: x @ (p["w"] / jnp.abs(x).max()),
        {"w": (16, 8)},
        (X,),
        {"w": DENSE},
    ),
    "learned queries": (
        lambda p, x: jnp.broadcast_to(p["queries"], (2, 5, 16)) @ p["w"] @ x.mT,
        {"queries": (5, 16), "w": (16, 16)},
        (X,),
        {"queries": "in no product: meets activations entry by entry", "w": DENSE},
    ),
    "look-up": (
        lambda p, i: p["table"][i],
        {"table": (50, 16)},
        (TOKENS,),
        {"table": "embedding (a look-up table)"},
    ),
    "look-up by a product": (
        lambda p, i: jax.nn.one_hot(i, 50) @ p["table"],
        {"table": (50, 16)},
        (TOKENS,),
        {"table": "embedding (a look-up table)"},
    ),
    "table of constants": (
        lambda p, x: x + p["table"][jnp.arange(6).reshape(2, 3)],
        {"table": (9, 16)},
        (X,),
        {"table": "embedding (a look-up table)"},
    ),
    "tied embedding": (
        lambda p, i: p["table"][i] @ p["table"].T,
        {"table": (50, 16)},
        (TOKENS,),
        {"table": "look-up table that is also multiplied (tied embedding)"},
    ),
    "not used": (lambda p, x: x, {"w": (16, 8)}, (X,), {"w": "in no product with an activation"}),
    "gate": (
        lambda p, x: (x[..., None] * p["w"][None, None]).sum(-2),
        {"w": (16, 8)},
        (X,),
        {"w": "in no product: meets activations entry by entry"},
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_weights_are_followed_to_their_products(name):
    forward, shapes, inputs, expected = FOLLOWED[name]
    params = {leaf: weight(*shape) for leaf, shape in shapes.items()}
    assert axes_of(forward, params, *inputs) == expected


# name -> (forward, shapes of the weights, what the reader says of each)
UNCLEAR = {
    "LoRA, merged": (
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
        {"w": (16, 8), "a": (16, 2), "b": (2, 8)},
        "derived from a, b, w",
    ),
    "standardized": (
        lambda p, x: x @ (p["w"] - p["w"].mean(0, keepdims=True)),
        {"w": (16, 8)},
        "derived from w",
    ),
    "rotated": (lambda p, x: x @ (jnp.ones((16, 16)) @ p["w"]), {"w": (16, 8)}, "derived from w"),
    "sorted": (lambda p, x: x @ jnp.sort(p["w"], 0), {"w": (16, 8)}, "through sort before"),
    "clipped away from zero": (
        lambda p, x: x @ jnp.clip(p["w"], 0.1, 1),
        {"w": (16, 8)},
        "derived from w",
    ),
    "noise added": (
        lambda p, x: x @ (p["w"] + jax.random.normal(jax.random.key(0), (16, 8))),
        {"w": (16, 8)},
        "derived from w",
    ),
    "scaled and softened": (
        lambda p, x: x @ (jax.nn.softplus(p["w"]) * x.max()),
        {"w": (16, 8)},
        "derived from w",
    ),
    "decomposed and scaled": (
        lambda p, x: x @ (jnp.linalg.qr(p["w"])[0] * x.max()),
        {"w": (16, 8)},
        "through",
    ),
    "one of two ways round": (
        lambda p, x: x @ jax.lax.cond(x.sum() > 0, lambda: p["w"], lambda: p["w"].T),
        {"w": (16, 16)},
        "through a branch or a loop",
    ),
    "repeated heads of two weights": (
        lambda p, x: jnp.einsum(
            "btd,hde,bse->bhts",
            x,
            jnp.einsum("dhk,ehk->hde", p["q"], jnp.repeat(p["k"], 2, axis=1)),
            x,
        ),
        {"q": (16, 4, 8), "k": (16, 2, 8)},
        "derived from k, q",
    ),
    "of constant features": (
        lambda p, x: x + jnp.tanh(jnp.linspace(0, 1, 48).reshape(3, 16) @ p["w"])[None],
        {"w": (16, 16)},
        "products have no input",
    ),
    "a part of merged axes": (
        lambda p, x: x @ p["w"].reshape(32, 8)[:16],
        {"w": (2, 16, 8)},
        "through slice",
    ),
    "both ways round": (
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
        {"w": (16, 8)},
        "sum over different axes: -2 and -1",
    ),
    "a part of an axis": (
        lambda p, x: jnp.einsum("btgd,gdf->btgf", x.reshape(2, 3, 4, 4), p["w"].reshape(4, 4, 8)),
        {"w": (16, 8)},
        "a part of axis -2 only",
    ),
    "a custom kernel": (
        lambda p, x: jax.pure_callback(lambda x, w: x @ w, weight(2, 3, 8), x, p["w"]),
        {"w": (16, 8)},
        "through pure_callback",
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_cannot_be_followed_is_named(name):
    forward, shapes, message = UNCLEAR[name]
    found = axes_of(forward, {leaf: weight(*shape) for leaf, shape in shapes.items()}, X)
    for leaf, axes in found.items():
        assert isinstance(axes, Unknown), leaf
        assert message in axes.reason


def test_low_rank_factors_beside_a_weight_are_weights():
    def forward(p, x):
        return x @ p["w"] + (x @ p["a"]) @ p["b"]

    found = axes_of(forward, {"w": weight(16, 8), "a": weight(16, 2), "b": weight(2, 8)}, X)
    assert set(found.values()) == {DENSE}


def test_leaves_that_are_not_arrays_are_passed_on():
    params = {"w": weight(16, 8), "activation": jnp.tanh, "name": "layer"}
    found = axes_of(lambda p, x: p["activation"](x @ p["w"]), params, X)
    assert found == {"w": DENSE}


def test_shapes_stand_for_float32_inputs():
    assert axes_of(lambda p, x: x @ p["w"], {"w": weight(16, 8)}, (2, 16)) == {"w": DENSE}


def test_nothing_is_computed():
    big = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
    assert axes_of(lambda p, x: x @ p["w"], {"w": big}, (1, 10**6)) == {"w": DENSE}
