"""What the public products accept, refuse and choose."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.kernels import matmul
from nmjax.kernels.cpu import compiled
from nmjax.kernels.cpu.library import Library
from tests.nmjax.packed_weights import prune_and_pack

PARAMS = {
    "dense": {"kernel": jnp.ones((16, 32), jnp.float32)},
    "conv": {"kernel": jnp.ones((3, 3, 16, 32), jnp.float32)},
}


def pack(pattern):
    packed = prune_and_pack(PARAMS, nmjax.make_plan(PARAMS, pattern))
    return packed["dense"]["kernel"], packed["conv"]["kernel"]


DENSE, CONV = pack("1x4@0.75")
X, IMAGES = jnp.ones((2, 16), jnp.float32), jnp.ones((1, 5, 5, 16), jnp.float32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nmjax.packed_matmul(X, jnp.ones((16, 32))), TypeError, "nmjax.pack"),
        (lambda: nmjax.packed_matmul(X.astype(int), DENSE), TypeError, "floating"),
        (lambda: nmjax.packed_matmul(X[:, :8], DENSE), ValueError, r"\(2, 8\).*\(16,\)"),
        (lambda: nmjax.packed_matmul(X, CONV), ValueError, "packed_conv"),
        (lambda: nmjax.packed_matmul(X, DENSE, jnp.ones(31)), ValueError, r"\(31,\).*\(32,\)"),
        (lambda: nmjax.packed_matmul(X, DENSE, activation="gelu"), ValueError, "gelu"),
        (lambda: nmjax.packed_matmul(X, DENSE, implementation="cuda"), ValueError, "cuda"),
        (lambda: nmjax.packed_conv(IMAGES, DENSE), ValueError, "packed_matmul"),
        (lambda: nmjax.packed_conv(IMAGES[..., :8], CONV), ValueError, "16 channels"),
        (lambda: nmjax.packed_conv(X, CONV), ValueError, "2 spatial axes"),
        (lambda: nmjax.packed_conv(IMAGES, CONV, strides=(1, 2, 1)), ValueError, "3 entries"),
        (lambda: nmjax.packed_conv(IMAGES, CONV, strides=0), ValueError, "at least 1"),
        (lambda: nmjax.packed_conv(IMAGES, CONV, strides=1.5), TypeError, "strides.* 1.5"),
        (lambda: nmjax.packed_conv(IMAGES, CONV, dilation=(1, 1.5)), TypeError, "dilation.* 1.5"),
        (lambda: nmjax.packed_conv(IMAGES, CONV, padding=-1), ValueError, "negative"),
        (lambda: nmjax.packed_conv(IMAGES, CONV, padding=0.5), TypeError, "padding.* 0.5"),
        (lambda: nmjax.packed_conv(IMAGES, CONV, padding=(1, (1, 2, 3))), ValueError, "3 entries"),
        (lambda: nmjax.packed_conv(IMAGES, CONV, padding="FULL"), ValueError, "'FULL'"),
        (
            lambda: nmjax.packed_conv(IMAGES[:, :2], CONV, padding="VALID"),
            ValueError,
            "does not fit",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("implementation", [None, "xla", "ffi"])
@pytest.mark.parametrize("pattern", ["2:4", "1x16@0.5", "1x16@0.5/layer"])
def test_a_stack_of_layers_is_no_operand(implementation, pattern):
    stacks = jax.tree.map(lambda w: jnp.ones((3, *w.shape), w.dtype), PARAMS)
    plan = nmjax.make_plan(PARAMS, pattern)
    packed = prune_and_pack(stacks, plan)
    with pytest.raises(ValueError, match=r"\(3, 16, 32\) is not one matrix.*vmap"):
        nmjax.packed_matmul(X, packed["dense"]["kernel"], implementation=implementation)
    with pytest.raises(ValueError, match=r"\(3, 3, 3, 16, 32\) is not one kernel.*vmap"):
        nmjax.packed_conv(IMAGES, packed["conv"]["kernel"], implementation=implementation)


@pytest.mark.parametrize(("pattern", "words"), [("1x2@0.75", "multiple of 4"), ("1:64", "2 to 32")])
def test_what_kernels_cannot_take_is_said(pattern, words):
    params = {"kernel": jnp.ones((64, 32), jnp.float32)}
    x = jnp.ones((1, 64), jnp.float32)
    packed = prune_and_pack(params, nmjax.make_plan(params, pattern))["kernel"]
    if nmjax.backends()["ffi"].startswith("ready"):
        with pytest.raises(NotImplementedError, match=words):
            nmjax.packed_matmul(x, packed, implementation="ffi")
    np.testing.assert_allclose(nmjax.packed_matmul(x, packed), x @ nmjax.unpack(packed))


def chosen(monkeypatch, library, pattern, batch, dtype=jnp.float32):
    monkeypatch.setattr(compiled, "load_library", lambda: library)
    params = {"kernel": jnp.ones((64, 128), dtype)}
    packed = prune_and_pack(params, nmjax.make_plan(params, pattern))["kernel"]
    return matmul.choose(jnp.dtype(dtype), packed, batch)


FAST, NONE = Library("avx2"), Library(None, "not built")


@pytest.mark.parametrize(
    ("library", "pattern", "batch", "name"),
    [
        (FAST, "1x16@0.75", 256, "ffi"),
        (FAST, "1x16@0.1", 256, "xla"),
        (FAST, "1x2@0.75", 256, "xla"),
        (FAST, "1:16", 1, "ffi"),
        (FAST, "3:4", 1, "xla"),
        (Library("portable"), "1x16@0.75", 256, "xla"),
        (NONE, "1x16@0.75", 4, "gather"),
        (NONE, "1x16@0.75", 256, "xla"),
        (NONE, "1x16@0.95", 256, "row_by_row"),
        (NONE, "1x64@0.75", 256, "row_by_row"),
        (NONE, "1x16@0.75/layer", 4, "xla"),
        (NONE, "2:4", 1, "xla"),
    ],
)
def test_choice(monkeypatch, library, pattern, batch, name):
    assert chosen(monkeypatch, library, pattern, batch).name == name


def expected_speedup(monkeypatch, shape, pattern, dtype):
    monkeypatch.setattr(compiled, "load_library", lambda: FAST)
    params = {"kernel": jax.ShapeDtypeStruct(shape, dtype)}
    axes = nmjax.Axes((-2,), (-1,), tuple(range(-len(shape), -2)))
    plan = nmjax.make_plan(params, pattern, axes={"kernel": axes})
    packed = jax.eval_shape(lambda params: prune_and_pack(params, plan), params)["kernel"]
    return matmul.expected_speedup(jnp.dtype(dtype), packed)


@pytest.mark.parametrize(
    ("work", "shape", "dtype", "count"),
    [
        ("matmul 256 x 4096 x 4096 float32", (320, 128), jnp.float32, 5),
        ("matmul 256 x 1024 x 1024 float32", (320, 128), jnp.float32, 4),
        ("matmul 256 x 4096 x 4096 bfloat16", (320, 128), jnp.bfloat16, 3),
        ("conv 1x1/1 1x14x14x1024 -> 256", (1, 1, 320, 128), jnp.float32, 3),
        ("conv 3x3/1 1x14x14x256 -> 256", (3, 3, 320, 128), jnp.float32, 3),
    ],
)
def test_expected_speedups_are_those_that_were_measured(monkeypatch, work, shape, dtype, count):
    file = Path(__file__).parents[3] / "experiments/benchmarks/results/packed-cpu.json"
    rows = json.loads(file.read_text())["results"]["1 threads"]
    rows = [row for row in rows if row["work"] == work and "layer" not in row["pattern"]]
    assert len(rows) == count
    for row in rows:
        expected = expected_speedup(monkeypatch, shape, row["pattern"], dtype)
        assert 0.85 < expected / row["speedup"] < 1.18, (row["pattern"], expected, row["speedup"])


@pytest.mark.parametrize(
    ("pattern", "shape", "dtype"),
    [
        ("1x16@0.4", (320, 128), jnp.float32),
        ("1x16@0.5", (320, 128), jnp.bfloat16),
        ("1x16@0.5", (3, 3, 320, 128), jnp.bfloat16),
        ("1:4", (320, 128), jnp.bfloat16),
    ],
)
def test_no_speedup_is_promised_that_was_not_measured(monkeypatch, pattern, shape, dtype):
    assert expected_speedup(monkeypatch, shape, pattern, dtype) is None


def test_the_dense_product_is_as_fast_as_itself(monkeypatch):
    assert expected_speedup(monkeypatch, (320, 128), "1x16@0.1", jnp.float32) == 1.0
    params = {"kernel": jnp.ones((320, 128))}
    packed = prune_and_pack(params, nmjax.make_plan(params, "1:16"))["kernel"]
    monkeypatch.setattr(compiled, "load_library", lambda: NONE)
    assert matmul.expected_speedup(jnp.dtype(jnp.float32), packed) == 1.0


def test_the_reason_is_in_words(monkeypatch):
    assert "above" in chosen(monkeypatch, FAST, "1x16@0.1", 256).reason
    assert "not built" in chosen(monkeypatch, NONE, "2:4", 1).reason
    assert "float16" in chosen(monkeypatch, FAST, "2:4", 1, jnp.float16).reason


@pytest.mark.parametrize("implementation", ["gather", "row_by_row", "xla"])
def test_every_way_in_plain_xla_is_the_same_product(implementation):
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(64, 128)), jnp.float32)}
    packed = prune_and_pack(params, nmjax.make_plan(params, "1x16@0.75"))["kernel"]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(9, 64)), jnp.float32)
    y = nmjax.packed_matmul(
        x, packed, jnp.ones(128), activation="relu", implementation=implementation
    )
    expected = np.maximum(np.asarray(x, np.float64) @ np.asarray(nmjax.unpack(packed)) + 1, 0)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["gather", "row_by_row", "decode", "cusparselt"])
def test_what_an_implementation_cannot_do_is_not_implemented(implementation):
    with pytest.raises(NotImplementedError, match=f'"{implementation}" cannot multiply'):
        nmjax.packed_conv(IMAGES, CONV, implementation=implementation)


def test_a_row_makes_an_implementation(monkeypatch):
    def never(dtype, packed, rows):
        raise NotImplementedError("not on Tuesdays")

    double = matmul.Row(
        lambda x, packed, bias, activation: 2 * (x @ packed.unpack()),
        None,
        lambda dtype, packed, rows: None,
        lambda packed, rows: "it is new",
    )
    table = {"double": double, **matmul.IMPLEMENTATIONS}
    monkeypatch.setattr(matmul, "IMPLEMENTATIONS", table)
    np.testing.assert_allclose(nmjax.packed_matmul(X, DENSE), 2 * (X @ DENSE.unpack()))
    table["double"] = double._replace(check=never)
    np.testing.assert_allclose(nmjax.packed_matmul(X, DENSE), X @ DENSE.unpack())  # The next one.
    with pytest.raises(NotImplementedError, match=r'"double" cannot multiply.*not on Tuesdays'):
        nmjax.packed_matmul(X, DENSE, implementation="double")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.bfloat16])
def test_dtypes_promote_as_in_jax(dtype):
    if jax.config.jax_numpy_dtype_promotion == "strict" and dtype != jnp.float32:
        with pytest.raises(jax.dtypes.TypePromotionError):
            nmjax.packed_matmul(X.astype(dtype), DENSE)
        return
    y = nmjax.packed_matmul(X.astype(dtype), DENSE)
    assert y.dtype == jnp.promote_types(dtype, jnp.float32)


def test_other_platforms_get_the_unpacked_product():
    packed = DENSE
    text = jax.jit(nmjax.packed_matmul).trace(X, packed).lower(lowering_platforms=("cuda",))
    assert "nmjax_blocks" not in text.as_text()


def test_weights_without_a_fast_product_are_unpacked_once(monkeypatch):
    params = {"w": jax.random.normal(jax.random.key(0), (32, 16)), "scale": jnp.ones(3)}
    slow = prune_and_pack(params, nmjax.make_plan(params, "3:4"))
    ready = nmjax.unpack_slow(slow)
    np.testing.assert_array_equal(ready["w"], nmjax.unpack(slow)["w"])
    fast = prune_and_pack(params, nmjax.make_plan(params, "1x16@0.9"))
    if nmjax.backends()["ffi"].startswith("ready: avx"):
        assert nmjax.unpack_slow(fast)["w"] is fast["w"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert nmjax.unpack_slow(fast)["w"].shape == (32, 16)


def test_a_stack_is_unpacked_if_its_layers_are_slow(monkeypatch):
    monkeypatch.setattr(compiled, "load_library", lambda: FAST)
    stacks = jax.tree.map(lambda w: jnp.ones((3, *w.shape), w.dtype), PARAMS)
    for pattern in ("2:4", "1x16@0.5", "1x16@0.5/layer"):
        ready = nmjax.unpack_slow(prune_and_pack(stacks, nmjax.make_plan(PARAMS, pattern)))
        assert not isinstance(ready["dense"]["kernel"], jax.Array)
        assert isinstance(ready["conv"]["kernel"], jax.Array) == (pattern == "2:4")
