"""Packed weights of integers: their rounding, products by definition, files and errors."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import nmjax
import nmjax.nnx
import nmjax.post_training
from nmjax import linen
from nmjax.files.tensor_files import read_tensors, write_tensors
from nmjax.trees.leaves import named_leaves
from tests.nmjax.packed_weights import prune_and_pack

SHAPES = ((8, 1), (16, 5), (40, 3))
# Every kind of packed leaf: matrices, kernels with taps, taps in a group, stacks.
MATRIX = nmjax.Axes((-2,), (-1,))
KERNEL = nmjax.Axes((-2,), (-1,), (-4, -3))
LEAVES = {
    "2:4": ((16, 8), MATRIX),
    "3:5/2": ((20, 4), MATRIX),
    "1x4@0.5": ((12, 8), MATRIX),
    "1x2@0.5/layer": ((6, 8), MATRIX),
    "2:4 conv": ((3, 2, 8, 4), KERNEL),
    "1x4@0.5 conv": ((3, 2, 4, 8), KERNEL),
    "1:4/kernel conv": ((2, 2, 4, 4), KERNEL),
    "2:4 stack": ((3, 8, 4), MATRIX),
    "2:4 transposed": ((4, 8), nmjax.Axes((-1,), (-2,))),
}


def packed_leaf(kind, seed=0):
    shape, axes = LEAVES[kind]
    params = {"kernel": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}
    plan = nmjax.make_plan(params, kind.split()[0], axes={"kernel": axes})
    return prune_and_pack(params, plan)["kernel"]


@jax.jit
def pack(w):
    params = {"kernel": w}
    return prune_and_pack(params, nmjax.make_plan(params, "2:4"))["kernel"]


def packed_by_hand(w, scales):
    """What the format is said to hold, one weight after the other: values and codes."""
    inputs, outputs = w.shape
    values = np.zeros((inputs // 4, 2, outputs), np.int8)
    codes = np.zeros((inputs // 8, outputs), np.uint8)
    for output in range(outputs):
        for group in range(inputs // 4):
            entries = w[4 * group : 4 * group + 4, output]
            order = sorted(range(4), key=lambda i: (-abs(entries[i]), i))
            first, second = sorted(order[:2])
            codes[group // 2, output] |= (first | second << 2) << 4 * (group % 2)
            kept = entries[[first, second]]
            values[group, :, output] = np.round(kept / scales[output])
    return values, codes


@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1))
def test_the_layout_bit_by_bit(shape, seed):
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    w[:, 0] = np.round(w[:, 0])  # Ties and zeros.
    made = nmjax.quantize(pack(w))
    scales = np.asarray(made.scales)
    values, codes = packed_by_hand(w, scales)
    np.testing.assert_array_equal(made.values, values)
    np.testing.assert_array_equal(made.packed.codes, codes)
    largest = np.abs(w).max(axis=0)  # It is kept in its group.
    np.testing.assert_allclose(scales, np.where(largest, largest / 127, 1), rtol=1e-6)
    assert made.values.dtype == jnp.int8
    assert made.nbytes == values.size + codes.size + 4 * scales.size
    assert made.shape == w.shape


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", LEAVES)
def test_scales_and_errors_of_every_kind(kind):
    packed = packed_leaf(kind)
    made = nmjax.quantize(packed)
    plan = packed.leaf_plan
    w, back = np.asarray(packed.unpack()), np.asarray(made.unpack())
    summed = (*plan.reduction_axes, *plan.tap_axes)
    steps = np.abs(w).max(axis=summed, keepdims=True) / 127
    assert (np.abs(back - w) <= steps * (0.5 + 1e-5)).all()
    np.testing.assert_array_equal(back == 0, np.abs(w) <= steps * 0.5)
    outputs = (*(plan.shape[a] for a in plan.output_axes),)
    assert made.scales.size == steps.size
    assert made.scales.shape[-1] == np.prod(outputs)
    assert back.dtype == np.float32
    assert made.astype(jnp.bfloat16).unpack().dtype == jnp.bfloat16


def product(x, leaf):
    return (nmjax.packed_conv if leaf.kernel_taps else nmjax.packed_matmul)(x, leaf)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", [kind for kind in LEAVES if kind != "2:4 stack"])
def test_products_are_exact_sums_of_integers(kind):
    """Integers times integers, summed by NumPy in int64; scales are powers of two."""
    made = nmjax.quantize(packed_leaf(kind))
    rng = np.random.default_rng(1)
    scales = jnp.asarray(2.0 ** rng.integers(-3, 4, made.scales.shape), jnp.float32)
    made = nmjax.Quantized(made.packed, scales, made.weight_dtype)
    taps, plan = made.kernel_taps, made.leaf_plan
    spatial = (3,) * len(taps)
    x = rng.integers(-9, 10, (2, *spatial, made.reduction_shape[0]))
    w = np.asarray(made.packed.with_values(made.values.astype(jnp.float32)).unpack(), np.int64)
    if plan.reduction_axes == (-1,):
        w = w.T
    if not taps:
        expected = x @ w
    else:  # "SAME": zeros on both sides, one pixel more behind if taps are even.
        pads = [((tap - 1) // 2, tap // 2) for tap in taps]
        image = np.pad(x, [(0, 0), *pads, (0, 0)])
        expected = sum(image[:, i : i + 3, j : j + 3] @ w[i, j] for i, j in np.ndindex(*taps))
    y = product(jnp.asarray(x, jnp.float32), made)
    np.testing.assert_array_equal(np.asarray(y), expected * np.asarray(scales))


@given(st.integers(0, 2**32 - 1), st.sampled_from([None, "relu"]))
def test_bias_activation_and_narrow_inputs(seed, activation):
    rng = np.random.default_rng(seed)
    made = nmjax.quantize(pack(rng.normal(size=(16, 5)).astype(np.float32)))
    x = jnp.asarray(rng.normal(size=(3, 16)), jnp.bfloat16)
    bias = rng.normal(size=5).astype(np.float32)
    y = nmjax.packed_matmul(x, made, bias, activation=activation)
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64) @ np.asarray(made.unpack(), np.float64) + bias
    expected = np.maximum(expected, 0) if activation else expected
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_transformations_and_gradients():
    made = nmjax.quantize(packed_leaf("2:4 stack"))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 8)), jnp.float32)
    w = np.asarray(made.unpack())
    many = jax.vmap(nmjax.packed_matmul, (None, 0))(x, made)
    np.testing.assert_allclose(many, np.asarray(x) @ w, rtol=1e-5, atol=1e-5)
    scanned = jax.lax.scan(lambda x, layer: (x, nmjax.packed_matmul(x, layer)), x, made)[1]
    np.testing.assert_allclose(scanned, many, rtol=1e-5, atol=1e-5)
    layer = made.first_layer()
    assert layer.shape == (8, 4)
    grad = jax.grad(lambda x: nmjax.packed_matmul(x, layer).sum())(x)
    np.testing.assert_allclose(grad, np.tile(w[0].sum(axis=-1), (5, 1)), rtol=1e-5, atol=1e-5)


def test_linen_and_nnx_layers():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 6, 6, 8)), jnp.float32)
    model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Dense(4, dtype=jnp.bfloat16)])
    params = model.init(jax.random.key(0), x)["params"]
    packed = nmjax.quantize(prune_and_pack(params, linen.make_plan(model, "1x4@0.5", x)))
    y = jax.jit(linen.packed_apply(model))({"params": packed}, x)
    expected = model.apply({"params": nmjax.unpack(packed)}, x)
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(y.astype("f4"), expected.astype("f4"), rtol=0.02, atol=0.02)

    layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    x = x[0, 0].astype(jnp.bfloat16)
    plan = nmjax.nnx.make_plan(layer, "2:4", inputs=(x,))
    nmjax.nnx.prune(layer, plan)
    served = nmjax.nnx.pack(layer, plan)
    kernel = nmjax.quantize(served.kernel[...])
    served.kernel.set_value(kernel)
    assert served(x).dtype == layer(x).dtype == jnp.bfloat16
    expected = np.asarray(x, np.float32) @ np.asarray(kernel.unpack(), np.float32)
    np.testing.assert_allclose(np.asarray(served(x), np.float32), expected, rtol=0.02, atol=0.02)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", LEAVES)
def test_rounded_inputs_are_near_the_others(kind):
    packed = packed_leaf(kind)
    made = nmjax.quantize(packed, inputs="dynamic")
    assert made.inputs_are == ("float" if "conv" in kind else "dynamic")
    if "stack" in kind:
        made, packed = made.first_layer(), packed.first_layer()
    spatial = (3,) * len(made.kernel_taps)
    x = jnp.asarray(np.random.default_rng(7).normal(size=(2, *spatial, made.reduction_shape[0])))
    y, expected = (np.asarray(product(x.astype(jnp.float32), leaf)) for leaf in (made, packed))
    np.testing.assert_allclose(y, expected, atol=0.03 * np.abs(expected).max())
    if "conv" in kind:  # As if the file said so: the inputs of the whole image are rounded.
        y = product(x.astype(jnp.float32), dataclasses.replace(made, inputs_are="dynamic"))
        np.testing.assert_allclose(y, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.not_under("jax_debug_nans")
def test_static_steps_saturate_and_count():
    packed = {"a": packed_leaf("1x4@0.5"), "s": packed_leaf("2:4 stack")}
    rng = np.random.default_rng(8)
    squares = {"a": rng.uniform(1, 2, (1, 12)), "s": rng.uniform(1, 2, (3, 1, 8))}
    made = nmjax.quantize(packed, squares)
    steps = {name: 6 * np.sqrt(x.max(axis=(-2, -1))) / 127 for name, x in squares.items()}
    for name, leaf in made.items():
        np.testing.assert_allclose(leaf.input_steps, steps[name], rtol=1e-6)
    leaf, step = made["a"], np.float32(made["a"].input_steps)
    x = rng.normal(scale=4, size=(9, 12)).astype(np.float32)
    q = np.clip(np.round(x / step), -127, 127)
    w = np.asarray(leaf.packed.with_values(leaf.values.astype(jnp.float32)).unpack())
    expected = (q.astype(np.int64) @ w.astype(np.int64)) * step * np.asarray(leaf.scales)
    for implementation in (None, "xla"):
        y = nmjax.packed_matmul(jnp.asarray(x), leaf, implementation=implementation)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    count = int(leaf.saturated(jnp.asarray(x)))
    assert count == (np.abs(x / step) > 127.5).sum() > 0
    assert int(nmjax.quantize(packed)["a"].saturated(jnp.asarray(x))) == 0
    x[2, 3] = np.nan
    y = nmjax.packed_matmul(jnp.asarray(x), leaf)
    assert np.isnan(y).all(axis=1).tolist() == [i == 2 for i in range(9)]
    y = jax.vmap(nmjax.packed_matmul, (None, 0))(jnp.ones((2, 8)), made["s"])
    np.testing.assert_allclose(y, jnp.ones((2, 8)) @ made["s"].unpack(), atol=0.2)


def test_statistics_of_activations():
    rng = np.random.default_rng(9)
    params = {"w": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)

    def forward(params, x):
        return x @ params["w"]

    plan = nmjax.make_plan(params, "1x4@0.5", forward=forward, inputs=(x,))
    packed = prune_and_pack(params, plan)
    for kind in ("mean_square", "gram"):
        found = nmjax.post_training.collect(forward, params, [x], plan, kind=kind)
        leaf = nmjax.quantize(packed, found)["w"]
        widest = np.sqrt((np.asarray(x) ** 2).mean(axis=0).max())
        np.testing.assert_allclose(leaf.input_steps, 6 * widest / 127, rtol=1e-5)
        assert int(leaf.saturated(x)) == 0
    for wrong, words in (
        ({}, "no statistics of w"),
        ({"w": np.ones((1, 8))}, "have shape"),
        ({"w": np.zeros((1, 16))}, "finite and not all zero"),
        ({"w": np.full((1, 16), np.nan)}, "finite and not all zero"),
    ):
        with pytest.raises(ValueError, match=words):
            nmjax.quantize(packed, wrong)
    with pytest.raises(ValueError, match="does not use statistics"):
        nmjax.quantize(packed, found, inputs="dynamic")


def test_an_output_of_zeros_stays_zero():
    made = nmjax.quantize(pack(np.zeros((8, 2), np.float32)))
    assert made.scales.tolist() == [1, 1]
    assert not np.asarray(made.values).any()


@pytest.mark.not_under("jax_debug_nans")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_stays_visible_under_jit(bad):
    w = np.ones((8, 2), np.float32)
    w[5, 1] = bad
    packed = {"a": {"kernel": pack(w)}}
    with pytest.raises(ValueError, match="NaN or infinite somewhere: a/kernel"):
        nmjax.quantize(packed)
    made = jax.jit(nmjax.quantize)(packed)["a"]["kernel"]
    y = nmjax.packed_matmul(jnp.ones((1, 8)), made)
    assert np.isfinite(y[0, 0])
    assert not np.isfinite(y[0, 1])


def test_what_cannot_be_quantized():
    packed = {"a": pack(np.ones((8, 2), np.float32)), "bias": jnp.ones(2)}
    made = nmjax.quantize(packed)
    with pytest.raises(ValueError, match=r"a Quantized 2:4 .* is quantized already"):
        nmjax.quantize(made)
    with pytest.raises(ValueError, match='inputs must be "float" or "dynamic"'):
        nmjax.quantize(packed, inputs="static")
    with pytest.raises(ValueError, match="no leaf is packed"):
        nmjax.quantize({"bias": packed["bias"]})
    with pytest.raises(TypeError, match=r"a .* has values of int8, not floats"):
        nmjax.quantize({"a": made["a"].packed})
    for use in (
        lambda leaf: nmjax.packed_matmul(jnp.ones((1, 8)), leaf),
        lambda leaf: leaf.unpack(),
    ):
        with pytest.raises((TypeError, ValueError), match="without scales"):
            use(made["a"].packed)
    with pytest.raises(TypeError, match="expected int8"):
        nmjax.Quantized(packed["a"], made["a"].scales, np.dtype("f4")).unpack()
    cast = jax.tree.map(lambda a: a.astype(jnp.float16) if a.ndim == 1 else a, made["a"])
    with pytest.raises(TypeError, match=r"scales of .* float16"):
        nmjax.packed_matmul(jnp.ones((1, 8)), cast)


# Files


TREE = nmjax.quantize({"conv": packed_leaf("1x4@0.5 conv"), "b/sr": packed_leaf("1x2@0.5/layer")})
TREE["nm"] = packed_leaf("2:4").astype(jnp.bfloat16)
TREE["static"] = nmjax.quantize({"a": packed_leaf("2:4")}, {"a": np.ones((1, 16))})["a"]
TREE["wide"] = nmjax.quantize(packed_leaf("2:4").astype(jnp.bfloat16), inputs="dynamic")


@pytest.fixture
def parts(tmp_path):
    """Tensors and manifest of a good file, and a function that loads them once changed."""
    nmjax.save_packed(tmp_path / "x", TREE)
    tensors, metadata = read_tensors(tmp_path / "x")
    manifest = json.loads(metadata["nmjax"])

    def load():
        write_tensors(tmp_path / "y", tensors, {"nmjax": json.dumps(manifest)})
        return nmjax.load_packed(tmp_path / "y")

    return tensors, manifest, load


def test_files_restore_every_bit(parts):
    _, manifest, load = parts
    assert (manifest["version"], manifest["quantized"]) == (
        3,
        {"b/sr": "float", "conv": "float", "static": "static", "wide": "dynamic"},
    )
    loaded = named_leaves(load(), is_leaf=nmjax.packed.weight.is_packed)
    before = named_leaves(TREE, is_leaf=nmjax.packed.weight.is_packed)
    assert loaded.keys() == before.keys()
    for name, leaf in loaded.items():
        assert jax.tree.structure(leaf) == jax.tree.structure(before[name])
        jax.tree.map(np.testing.assert_array_equal, leaf, before[name])
    size = nmjax.sizes(TREE).leaves["conv"]
    assert size.dense == 3 * 2 * 4 * 8 * 4
    assert size.packed == TREE["conv"].nbytes == 3 * 2 * 2 * 8 + 4 + 8 * 4


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (lambda t, m: t.update({"conv/scales": np.zeros(8, "f4")}), "finite and above zero"),
        (lambda t, m: t.update({"conv/scales": np.full(8, np.nan, "f4")}), "finite and above zero"),
        (lambda t, m: t.update({"conv/scales": np.full(8, np.inf, "f4")}), "finite and above zero"),
        (lambda t, m: t.update({"conv/scales": np.ones(8, "f8")}), "scales of .* float64"),
        (lambda t, m: t.update({"conv/scales": np.ones(4, "f4")}), "expected float32"),
        (lambda t, m: t.pop("conv/scales"), "conv/scales is missing"),
        (lambda t, m: t.update({"conv/values": np.full_like(t["conv/values"], -128)}), "-127 to"),
        (lambda t, m: m["quantized"].pop("conv"), "below another leaf"),
        (lambda t, m: m["quantized"].update(nm="float"), "nm/scales is missing"),
        (lambda t, m: m["quantized"].update(x="float"), "x is quantized, but"),
        (lambda t, m: m["quantized"].update(conv=1), "is a int"),
        (lambda t, m: t.pop("static/input_steps"), "static/input_steps is missing"),
        (lambda t, m: t.update({"static/input_steps": np.zeros((), "f4")}), "above zero"),
        (lambda t, m: t.update({"static/input_steps": np.ones(1, "f4")}), "expected float32"),
        (lambda t, m: m["quantized"].update(static="float"), "below another leaf"),
        (lambda t, m: m["quantized"].update(conv="x"), "inputs cannot be 'x'"),
        (lambda t, m: m.update(quantized=[]), "is a list"),
        (lambda t, m: m.update(version=2), "should have the keys"),
        (lambda t, m: m["leaves"]["conv"].update(dtype="int32"), "should be floating"),
        (lambda t, m: m["leaves"]["conv"].update(dtype="no"), "not understood|should be"),
    ],
)
def test_forged_fields(parts, forge, words):
    tensors, manifest, load = parts
    forge(tensors, manifest)
    with pytest.raises(ValueError, match=words):
        load()


def test_exported_programs_take_quantized_arguments():
    exported = jax.export.export(jax.jit(nmjax.unpack))(TREE)
    again = jax.export.deserialize(bytearray(exported.serialize()))
    assert again.in_tree == exported.in_tree
    jax.tree.map(np.testing.assert_array_equal, again.call(TREE), nmjax.unpack(TREE))
