"""The masks of TPUs: the kernel, run step by step on a CPU, and where it takes the place of XLA."""

import importlib.util
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nmjax
from nmjax.masks.nm import _keep_by_tpu, nm_mask, nm_prune
from nmjax.masks.ranking import magnitude_keys, signed_keys
from tests.nmjax.float_bits import without_refused

TIES_AND_ODD_VALUES = [0.0, -0.0, 1.0, -1.0, 2.0, np.nan, -np.nan, np.inf, -np.inf, 1e-40, -3.0]


def weights(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    values = without_refused(rng.choice(TIES_AND_ODD_VALUES, shape).astype(np.float32))
    return jnp.asarray(np.where(rng.random(shape) < 0.5, values, rng.normal(size=shape)), dtype)


def by_kernel(w, n, m, axis, out, to_keys=magnitude_keys):
    rule = {"n": n, "m": m, "stride": 1, "axes": (axis,), "to_keys": to_keys}
    return jax.jit(partial(_keep_by_tpu, **rule, out=np.dtype(out), interpret=True))(w)


def kept_by_kernel(w, n, m, axis, to_keys=magnitude_keys):
    """The mask and the pruned weights, as the kernel computes them."""
    return tuple(by_kernel(w, n, m, axis, out, to_keys) for out in (bool, w.dtype))


def flushed(x):
    """In float32, without denormals: in the interpreter of jax 0.12, bfloat16 loses them."""
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)


def check_kernel(shape, dtype, n, m, axis):
    w = weights(shape, dtype)
    mask, pruned = kept_by_kernel(w, n, m, axis)
    wanted = np.asarray(nm_mask(w, n, m, axis))
    np.testing.assert_array_equal(mask, wanted)
    assert pruned.dtype == w.dtype
    zeroed = np.where(wanted, np.asarray(w, np.float32), 0)
    np.testing.assert_array_equal(flushed(pruned), flushed(zeroed))


@pytest.mark.parametrize(
    ("shape", "dtype", "n", "m", "axis"),
    [
        ((36, 130), "float32", 2, 4, -2),  # Ragged: no multiple of 8, 128, or the block.
        ((2, 20, 24), "bfloat16", 2, 4, -2),
        ((3, 132), "bfloat16", 2, 4, -1),
        ((9, 6), "float32", 1, 3, -2),
        ((2, 64, 12), "float32", 2, 4, -2),  # XLA stores these by columns.
        ((2, 12, 3, 5, 130), "bfloat16", 2, 4, -4),  # Along a leading axis.
    ],
)
def test_kernel_equals_nm_mask(shape, dtype, n, m, axis):
    check_kernel(shape, dtype, n, m, axis)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "n", "m", "axis"),
    [
        ((2100, 128), "float32", 2, 4, -2),  # More than one block.
        ((36, 132), "float32", 2, 4, -1),
        ((40, 8), "float32", 4, 8, -2),
        ((5, 48), "bfloat16", 4, 8, -1),
        ((64, 5), "bfloat16", 1, 16, -2),
        ((32, 5), "float32", 8, 32, -2),
        ((600, 8), "bfloat16", 1, 8, -1),
        ((18, 40, 6), "float32", 1, 3, -3),
        ((68, 7, 130), "bfloat16", 2, 4, -3),  # More than one block.
        ((68, 33, 6), "float32", 2, 4, -3),  # Laid out with this axis last.
    ],
)
def test_kernel_equals_nm_mask_elsewhere(shape, dtype, n, m, axis):
    check_kernel(shape, dtype, n, m, axis)


@pytest.mark.parametrize(
    ("shape", "m", "axis"), [((36, 130), 4, -2), ((9, 132), 4, -1), ((12, 9, 130), 3, -3)]
)
def test_kernel_rounds_to_bfloat16_what_it_keeps(shape, m, axis):
    w = weights(shape, "float32")
    rounded = by_kernel(w, 1, m, axis, jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    # Ranked before rounding: many of these weights are equal in bfloat16.
    wanted = jnp.where(nm_mask(w, 1, m, axis), w, 0).astype(jnp.bfloat16)
    np.testing.assert_array_equal(flushed(rounded), flushed(wanted))


@st.composite
def groups(draw):
    """A shape of at most two axes in front of a small matrix, and a pattern that fits it."""
    axis = draw(st.sampled_from((-1, -2, -3)))
    m = draw(st.sampled_from((2, 4, 8) if axis == -1 else (2, 4, 6, 8)))
    shape = draw(st.lists(st.integers(1, 3), min_size=max(0, -axis - 2), max_size=2))
    shape += [draw(st.integers(1, 40)), draw(st.sampled_from((1, 5, 127, 128, 130)))]
    shape[axis] = m * draw(st.integers(1, 9))
    return tuple(shape), draw(st.integers(1, m - 1)), m, axis


@pytest.mark.slow
@settings(max_examples=12)
@given(groups(), st.sampled_from(("float32", "bfloat16")))
def test_kernel_equals_nm_mask_in_any_shape(case, dtype):
    shape, n, m, axis = case
    check_kernel(shape, dtype, n, m, axis)


def test_kernel_ranks_by_value_too():
    scores = weights((16, 8), "float32")
    mask, _ = kept_by_kernel(scores, 2, 4, -2, signed_keys)
    np.testing.assert_array_equal(mask, nm_mask(scores, 2, 4, -2, score=lambda scores: scores))


@pytest.mark.parametrize(
    ("shape", "dtype", "n", "m", "axis", "words"),
    [
        ((8, 8), "float16", 2, 4, -2, "float16"),
        ((8,), "float32", 2, 4, -1, "along one axis of at least two"),
        ((128, 8), "float32", 2, 64, -2, "groups of 2 to 32"),
        ((8, 9), "float32", 1, 3, -1, "if m divides 128"),
        ((9, 8), "bfloat16", 1, 3, -2, "if m is even"),
        ((0, 8), "float32", 2, 4, -2, "no weights"),
    ],
)
def test_what_the_kernel_does_not_take(shape, dtype, n, m, axis, words):
    w = jnp.zeros(shape, dtype)
    with pytest.raises(NotImplementedError, match=words):
        kept_by_kernel(w, n, m, axis)
    # Without asking for the kernel, the mask comes from XLA on TPUs too.
    text = lowered_for("tpu", lambda w: nm_mask(w, n, m, axis), w)
    assert "tpu_custom_call" not in text


def lowered_for(platform, f, *arguments):
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def test_programs_for_tpus_have_the_kernel_and_no_others_do():
    params = {"kernel": jnp.ones((16, 8), jnp.float32)}
    plan = nmjax.make_plan(params, "2:4")
    tx = nmjax.add_sparse_refined(plan, 2e-4)

    def step(params):
        def loss(params):
            return jnp.sum(nmjax.sparsify(params, plan)["kernel"] ** 2)

        return tx.update(jax.grad(loss)(params), tx.init(params), params)[0]

    assert lowered_for("tpu", step, params).count("nm_prune_4") >= 1
    assert "tpu_custom_call" not in lowered_for("cpu", step, params)
    mask, stack = jax.vmap(lambda w: nm_mask(w, 2, 4)), jnp.ones((3, 8, 8), jnp.float32)
    assert "nm_mask_4" in lowered_for("tpu", mask, stack)
    assert "tpu_custom_call" not in lowered_for("cuda", mask, stack)


def test_pruning_has_the_gradient_of_its_mask():
    w = jnp.array([[0.0], [-0.0], [0.0], [0.0], [3.0], [2.0], [1.0], [4.0]])
    pruned, pull = jax.vjp(lambda w: nm_prune(w, 2, 4), w)
    np.testing.assert_array_equal(pruned, jnp.where(nm_mask(w, 2, 4), w, 0))
    np.testing.assert_array_equal(pull(jnp.ones_like(w))[0], nm_mask(w, 2, 4))
    batched = jax.vmap(lambda w: nm_prune(w, 2, 4), in_axes=2)(jnp.stack([w, 2 * w], axis=2))
    np.testing.assert_array_equal(batched, [pruned, 2 * pruned])


def test_shards_of_explicit_axes_go_through_the_kernel():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    for kind, taken_apart in ((AxisType.Explicit, True), (AxisType.Auto, False)):
        mesh = jax.make_mesh((4, 2), ("data", "model"), (kind,) * 2)
        sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
        w = jax.ShapeDtypeStruct((32, 256), "float32", sharding=sharding)
        text = lowered_for("tpu", lambda w: nm_prune(w, 2, 4), w)
        assert ("nm_prune_4" in text) == taken_apart
        inside = jax.shard_map(
            lambda w: nm_prune(w, 2, 4),
            mesh=mesh,
            in_specs=sharding.spec,
            out_specs=sharding.spec,
        )
        assert "nm_prune_4" in lowered_for("tpu", inside, w)


# Compiles for a TPU that is not there, in its own process: flags must be set before JAX starts.
COMPILED = """
from experiments.benchmarks.aot.compilers import on_chip, set_up, tpu_devices
set_up()
import re, jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from nmjax.masks.nm import nm_prune

def check(w, n, m, axis, shards, dtype=None):
    compiled = jax.jit(lambda w: nm_prune(w, n, m, axis, dtype=dtype)).lower(w).compile()
    least = w.size * (w.dtype.itemsize + np.dtype(dtype or w.dtype).itemsize) / shards
    assert 0.99 * least < compiled.cost_analysis()["bytes accessed"] <= 1.05 * least
    assert compiled.memory_analysis().temp_size_in_bytes == 0
    assert not re.findall("all-|collective-|reduce-scatter| copy[(]", compiled.as_text())

shape = (4096, 4096)
for dtype in ("float32", "bfloat16"):
    for axis in (-2, -1):
        check(on_chip("v5e", shape, dtype), 2, 4, axis, 1)
        check(on_chip("v5p", shape, "float32"), 2, 4, axis, 1, jax.numpy.bfloat16)
for n, m in ((4, 8), (1, 16), (8, 32)):
    check(on_chip("v5e", shape, "float32"), n, m, -2, 1)
for dtype in ("float32", "bfloat16"):
    check(on_chip("v5e", (4096, 32, 128), dtype), 2, 4, -3, 1)  # Inputs of heads.
    check(on_chip("v5e", (4096, 12, 64), dtype), 2, 4, -3, 1)
    check(on_chip("v5e", (32, 128, 4096), dtype), 2, 4, (-3, -2), 1)  # Heads to outputs.
devices = np.array(tpu_devices("v5e")).reshape(2, 2)
mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
for spec in (P("data", "model"), P(("data", "model"), None)):
    w = jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))
    check(w, 2, 4, -2, 4)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_compiled_for_a_tpu_it_reads_and_writes_once():
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
