"""Infinities, NaN, -0.0 and denormals: kept weights meet the input, dropped ones do not."""

import itertools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax
from nmjax.kernels import matmul

# NaN comes out of most of these products.
pytestmark = pytest.mark.not_under("jax_debug_nans")

ELSEWHERE = ("decode", "cusparselt", "tpu")
NAMES = [name for name in matmul.IMPLEMENTATIONS if name not in ELSEWHERE]
DTYPES = ["float32", "bfloat16", "float16", "float8_e5m2"]
# 1x4 blocks of 6 inputs keep an odd number, which a kernel takes in pairs.
PATTERNS = ["2:4", "1:4", "4:8", "1:16", "3:4", "8:64", "1x4@0.5", "1x16@0.5", "1x4@0.6/layer"]
ORDINARY = (0.0, -0.0, 1.0, -2.0, 0.5, 3.0)
SPECIAL = (np.inf, -np.inf, np.nan, -0.0)


def numbers(rng, shape, dtype, share):
    """Small numbers, of which a share is special or denormal."""
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    x = np.where(
        rng.random(shape) < share,
        rng.choice([*SPECIAL, tiny, -tiny], shape),
        rng.choice(ORDINARY, shape),
    )
    return jnp.asarray(x.astype(jnp.dtype(dtype)))


def packed_weight(rng, shape, pattern, dtype, share):
    """A packed weight that keeps arbitrary places, and those places."""
    axes = nmjax.Axes((-2,), (-1,), tuple(range(-len(shape), -2)))
    ranks = {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    plan = nmjax.make_plan(ranks, pattern, axes={"kernel": axes})
    masks = nmjax.compute_masks(ranks, plan)
    w = {"kernel": numbers(rng, shape, dtype, share)}
    packed = nmjax.pack(w, plan, masks)["kernel"]
    return packed, np.asarray(w["kernel"], np.float64), np.asarray(masks["kernel"])


def sums(x, w, kept):
    """Products of kept weights (rows, inputs, outputs), added up."""
    with np.errstate(invalid="ignore"):
        products = np.where(kept, x[:, :, None] * np.where(kept, w, 0), 0)
        return products.sum(axis=1)


def flushed(x, dtype):
    """Denormals as zeros."""
    return np.where(np.abs(x) < float(jnp.finfo(dtype).tiny), 0, x)


def assert_follows(y, x, w, kept, x_dtype, w_dtype, product=sums):
    """With denormals, or with zeros in their places."""
    x = np.asarray(x, np.float64)
    either = (
        product(x, w, kept),
        product(flushed(x, x_dtype), flushed(w, w_dtype), kept),
        product(flushed(x, x_dtype), w, kept),
        product(x, flushed(w, w_dtype), kept),
    )
    y = np.asarray(y, np.float64)
    right = np.zeros(y.shape, bool)
    for expected in either:
        # Halves and small integers are exact in every dtype; denormals may be lost.
        right |= np.isclose(y, expected, rtol=0, atol=1e-3, equal_nan=True)
    assert right.all(), (y[~right], either[0][~right])


@st.composite
def products(draw):
    pattern = draw(st.sampled_from(PATTERNS))
    step = int(pattern.split(":")[1]) if ":" in pattern else 3
    # Few shapes, since each is compiled.
    inputs = step * 2
    rows = draw(st.sampled_from([3, 40]))
    shares = draw(st.sampled_from([(0, 0.03), (0.03, 0), (0.03, 0.03), (0.3, 0.3), (0.01, 0.01)]))
    seed = draw(st.integers(0, 2**32 - 1))
    x_dtype = draw(st.sampled_from(DTYPES[:3]))
    return pattern, (inputs, 32), rows, shares, seed, x_dtype


@pytest.mark.one_in(2)
@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@given(case=products())
def test_matmul(name, w_dtype, case):
    pattern, shape, rows, (x_share, w_share), seed, x_dtype = case
    rng = np.random.default_rng(seed)
    packed, w, kept = packed_weight(rng, shape, pattern, w_dtype, w_share)
    x = numbers(rng, (rows, shape[0]), x_dtype, x_share)
    try:
        matmul.IMPLEMENTATIONS[name].check(x.dtype, packed, rows)
    except NotImplementedError:
        return
    y = nmjax.packed_matmul(x, packed, implementation=name)
    assert_follows(y, x, w, kept, x_dtype, w_dtype)


def convolved(strides, dilation, padding):
    """The definition of a convolution, pixel by pixel."""

    def product(x, w, kept):
        taps = w.shape[:2]
        x = np.pad(x, ((0, 0), *padding, (0, 0)))
        reach = [(tap - 1) * step for tap, step in zip(taps, dilation, strict=True)]
        sizes = [
            (size - far - 1) // stride + 1
            for size, far, stride in zip(x.shape[1:3], reach, strides, strict=True)
        ]
        y = np.zeros((len(x), *sizes, w.shape[-1]))
        for pixel in np.ndindex(*sizes):
            rows = [
                x[
                    :,
                    pixel[0] * strides[0] + i * dilation[0],
                    pixel[1] * strides[1] + j * dilation[1],
                ]
                for i, j in itertools.product(*map(range, taps))
            ]
            parts = [
                sums(row, w[tap], kept[tap])
                for row, tap in zip(rows, np.ndindex(*taps), strict=True)
            ]
            with np.errstate(invalid="ignore"):
                y[:, pixel[0], pixel[1]] = np.sum(parts, axis=0)
        return y

    return product


@pytest.mark.parametrize("name", ["xla", "ffi"])
@given(
    pattern=st.sampled_from(["1x4@0.5", "1x8@0.6/layer", "2:4", "1:2/kernel"]),
    taps=st.sampled_from([(1, 1), (3, 2)]),
    dilation=st.sampled_from([(2, 1), (9, 7)]),
    strides=st.just((2, 1)),
    shares=st.sampled_from([(0, 0.02), (0.02, 0), (0.01, 0.01)]),
    dtype=st.sampled_from(DTYPES[:2]),
    seed=st.integers(0, 2**32 - 1),
)
def test_conv(name, pattern, taps, dilation, strides, shares, dtype, seed):
    rng = np.random.default_rng(seed)
    shape = (*taps, 4, 16)
    packed, w, kept = packed_weight(rng, shape, pattern, dtype, shares[1])
    x = numbers(rng, (2, 5, 4, 4), dtype, shares[0])
    padding = tuple(((t - 1) * d // 2, (t - 1) * d) for t, d in zip(taps, dilation, strict=True))
    try:
        matmul.IMPLEMENTATIONS[name].check(x.dtype, packed, 40)
        y = nmjax.packed_conv(
            x, packed, strides=strides, dilation=dilation, padding=padding, implementation=name
        )
    except NotImplementedError:
        return
    assert_follows(y, x, w, kept, dtype, dtype, convolved(strides, dilation, padding))


@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_an_odd_number_of_kept_blocks(name, dtype):
    """Infinite inputs of the last block, whose partner in a pair does not exist."""
    params = {"kernel": jnp.ones((6, 16), dtype)}
    plan = nmjax.make_plan(params, "1x16@0.5")
    packed = nmjax.pack(nmjax.prune(params, plan), plan)["kernel"]
    x = jnp.ones((32, 6), dtype).at[:, 2].set(jnp.inf)
    y = nmjax.packed_matmul(x, packed, implementation=name)
    np.testing.assert_array_equal(y, jnp.full((32, 16), jnp.inf))
    # The other three inputs are dropped.
    x = jnp.ones((32, 6), dtype).at[:, 3].set(jnp.inf).at[:, 4].set(jnp.nan)
    np.testing.assert_array_equal(nmjax.packed_matmul(x, packed, implementation=name), 3)


def test_rows_are_independent_and_relu_keeps_nan():
    params = {"kernel": jnp.ones((8, 16))}
    plan = nmjax.make_plan(params, "2:4")
    packed = nmjax.pack(nmjax.prune(params, plan), plan)["kernel"]
    x = jnp.ones((4, 8)).at[1, 0].set(jnp.nan).at[2, 0].set(-jnp.inf)
    for name in ("xla", None):
        y = nmjax.packed_matmul(x, packed, activation="relu", implementation=name)
        np.testing.assert_array_equal(y[:, 0], [4, np.nan, 0, 4])


@pytest.mark.optimized
def test_one_condition_for_mapped_inputs(monkeypatch):
    """With one for each input, XLA would compute both branches everywhere."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    params = {"kernel": jnp.ones((8, 16))}
    plan = nmjax.make_plan(params, "2:4")
    packed = nmjax.pack(nmjax.prune(params, plan), plan)["kernel"]
    product = jax.vmap(lambda x: nmjax.packed_matmul(x, packed, implementation="xla"))
    x = jnp.ones((3, 5, 8)).at[1, 2, 2].set(jnp.inf)
    np.testing.assert_array_equal(product(x), jnp.full((3, 5, 16), 4))
    assert "conditional" in jax.jit(product).lower(x).compile().as_text()


@pytest.mark.optimized
@pytest.mark.parametrize("name", [None, "xla"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(16, 32), (3, 3, 8, 32)], ids=["matrix", "kernel"])
def test_a_sharded_batch_is_not_asked_whether_it_is_finite(shape, axis_type, name):
    """The devices would have to communicate about it."""
    mesh = jax.make_mesh((4,), ("d",), (axis_type,), devices=jax.devices()[:4])
    rng = np.random.default_rng(0)
    packed, _, _ = packed_weight(rng, shape, "2:4", "float32", 0)
    is_kernel = len(shape) == 4
    x = rng.choice(ORDINARY, (8, 4, 4, 8) if is_kernel else (8, 16))
    multiply = nmjax.packed_conv if is_kernel else nmjax.packed_matmul
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, PartitionSpec("d")))
        held = jax.device_put(packed, NamedSharding(mesh, PartitionSpec()))
        product = jax.jit(lambda x, packed: multiply(x, packed, implementation=name))
        text = product.lower(x, held).compile().as_text()
        assert not re.search("all-reduce|all-gather|all-to-all|collective-permute", text)
        y = product(x, held)
        assert y.sharding.spec[0] == "d"
    np.testing.assert_allclose(y, multiply(np.asarray(x), packed, implementation="xla"), atol=1e-4)


@pytest.mark.optimized
def test_a_shard_follows_the_rule():
    mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,), devices=jax.devices()[:4])
    params = {"kernel": jnp.ones((8, 16))}
    plan = nmjax.make_plan(params, "2:4")
    packed = nmjax.pack(nmjax.prune(params, plan), plan)["kernel"]
    x = jnp.ones((8, 8)).at[1, 2].set(jnp.inf)
    product = jax.jit(
        jax.shard_map(
            lambda x: nmjax.packed_matmul(x, packed, implementation="xla"),
            mesh=mesh,
            in_specs=PartitionSpec("d"),
            out_specs=PartitionSpec("d"),
        )
    )
    np.testing.assert_array_equal(product(x), 4)
    assert "all-reduce" not in product.lower(x).compile().as_text()
