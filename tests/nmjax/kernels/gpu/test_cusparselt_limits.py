"""What cuSPARSELt takes: rules and sizes, against what version 0.10.0 was recorded to answer."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmjax
from nmjax.kernels.gpu import cusparselt_limits as limits
from nmjax.kernels.gpu.cusparselt import check_semi_structured
from nmjax.patterns import NM
from tests.nmjax.packed_weights import prune_and_pack


def packed_leaf(pattern="2:4", shape=(32, 16), dtype=jnp.bfloat16):
    params = {"kernel": jnp.ones(shape, dtype)}
    axes = nmjax.Axes((-2,), (-1,), tuple(range(-len(shape), -2)))
    return prune_and_pack(params, nmjax.make_plan(params, pattern, axes={"kernel": axes}))["kernel"]


@given(st.integers(1, 8), st.sampled_from([1, 2, 4, 8, 12, 16]), st.integers(0, 2**32 - 1))
def test_which_patterns_are_2_4(n, m, seed):
    if n > m:
        return
    w = np.random.default_rng(seed).normal(size=(48, 4))
    mask = np.asarray(nmjax.nm_mask(jnp.asarray(w, jnp.float32), n, m))
    fits = (mask.reshape(12, 4, 4).sum(axis=1) <= 2).all()
    if NM(n, m).is_semi_structured:
        assert fits
    worst = np.arange(48) % m < n  # The kept ones of each group in a row.
    assert NM(n, m).is_semi_structured == (worst.reshape(12, 4).sum(axis=1) <= 2).all()


@pytest.mark.parametrize(
    ("pattern", "shape", "fits"),
    [
        ("2:4", (32, 16), True),
        ("1:4", (32, 16), True),
        ("2:8", (32, 16), True),
        ("2:4", (32, 24), False),
        ("1:8", (24, 16), False),
        ("4:8", (32, 16), False),
        ("1x4@0.5", (32, 16), False),
        ("2:4", (3, 3, 32, 16), False),
    ],
)
def test_which_layers_sparse_tensor_cores_run(pattern, shape, fits):
    packed = packed_leaf(pattern, shape, jnp.float32)
    with contextlib.nullcontext() if fits else pytest.raises(NotImplementedError):
        check_semi_structured(packed)


# Rows and inputs of the matrix, then bytes of its compressed form and of the buffer to make it:
# lines "dims/..." of sparselt.l40s.txt, and the last of sparselt.rtx-pro-6000-server.txt.
RECORDS = [
    ("float16", 16, 16, 512, 256),
    ("float16", 32, 32, 1280, 256),
    ("float16", 16, 64, 1280, 256),
    ("float16", 48, 48, 2816, 512),
    ("float16", 96, 64, 6912, 768),
    ("float16", 256, 128, 36864, 4096),
    ("int8", 32, 32, 2560, 1024),
    ("int8", 32, 96, 3584, 1024),
    ("int8", 96, 64, 7168, 2048),
    ("int8", 256, 128, 24576, 4096),
    ("int8", 64, 512, 24576, 4096),
    ("float8_e4m3fn", 256, 128, 20480, 49216),
]


@pytest.mark.parametrize("record", RECORDS, ids=str)
def test_there_is_room_for_what_was_recorded(record):
    dtype, rows, inputs, compressed, buffer = record
    for shape in ((rows, inputs), (inputs, rows)):
        assert limits.compressed_bytes(shape, jnp.dtype(dtype)) >= compressed
        assert limits.compressing_bytes(shape) >= buffer
        assert limits.multiplying_bytes(shape) >= buffer
        assert limits.searching_bytes(shape, 16, rows) >= buffer


def test_room_grows_with_the_matrix_and_is_not_wasted():
    # Values and codes of the largest records, which have no padding, in larger matrices.
    for dtype, bytes_a_weight in (("float16", 36864 / 2**15), ("int8", 24576 / 2**15)):
        room = limits.compressed_bytes((8192, 28672), jnp.dtype(dtype))
        assert 1 <= room / (bytes_a_weight * 8192 * 28672) < 1.001
    assert limits.compressing_bytes((8192, 28672)) >= 4096 / 2**15 * 8192 * 28672


def test_a_bias_has_a_dtype_of_its_own_for_integers():
    assert limits.bias_dtype("int8", "int32") == "float32"
    assert limits.bias_dtype("float8_e4m3fn", "float16") == "float16"
    assert limits.bias_dtype("bfloat16", "bfloat16") == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "shape", "transposed", "words"),
    [
        ("float32", (32, 16), False, "bfloat16, float16, int8"),
        ("bfloat16", (32, 8), False, "multiples of 16"),
        ("int8", (32, 16), True, "multiples of 32"),
        ("float8_e4m3fn", (32, 32), False, "transposed=True"),
        ("bfloat16", (2, 32, 16), False, "one matrix"),
    ],
)
def test_matrices_that_are_refused(dtype, shape, transposed, words):
    with pytest.raises(NotImplementedError, match=words):
        limits.check_matrix(jnp.dtype(dtype), shape, transposed)


def test_results_and_activations_that_are_refused():
    for dtype, results in limits.RESULTS.items():
        for result in results:
            for activation in (None, "relu"):
                limits.check_result(jnp.dtype(dtype), jnp.dtype(result), activation)
    bfloat16, int8 = jnp.dtype("bfloat16"), jnp.dtype("int8")
    limits.check_result(int8, int8, "gelu")
    with pytest.raises(NotImplementedError, match=r"apply jax\.nn\.gelu"):
        limits.check_result(bfloat16, bfloat16, "gelu")
    with pytest.raises(NotImplementedError, match=r"apply jax\.nn\.gelu"):
        limits.check_result(int8, jnp.dtype("int32"), "gelu")
    with pytest.raises(ValueError, match="'tanh'"):
        limits.check_result(bfloat16, bfloat16, "tanh")
    with pytest.raises(NotImplementedError, match="not float32"):
        limits.check_result(bfloat16, jnp.dtype("float32"), None)


def test_rows_that_are_refused():
    limits.check_batch(jnp.dtype("bfloat16"), 24)
    with pytest.raises(NotImplementedError, match="multiple of 16, not 24; pad it"):
        limits.check_batch(jnp.dtype("int8"), 24)
