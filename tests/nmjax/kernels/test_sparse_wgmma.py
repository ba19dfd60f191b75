"""What Hopper's sparse product is given and refused, and that JAX translates it; on the CPU."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.kernels import sparse_wgmma
from nmjax.kernels.position_words import position_words

MISSING = sparse_wgmma.why_no_kernel()
needs_kernel = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@functools.cache
def packed_leaf(pattern="2:4", shape=(64, 128), dtype=jnp.bfloat16):
    params = {"kernel": jnp.ones(shape, dtype)}
    return nmjax.pack(params, nmjax.make_plan(params, pattern))["kernel"]


def cuda_text(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@needs_kernel
@pytest.mark.parametrize(
    ("batch", "dtype", "instruction"),
    [
        (512, jnp.bfloat16, "m64n256k32.f32.bf16.bf16"),
        (24, jnp.float16, "m64n8k32.f32.f16.f16"),
    ],
)
def test_it_is_translated_for_gpus(batch, dtype, instruction):
    x, packed = jnp.ones((batch, 128), dtype), packed_leaf(shape=(128, 256), dtype=dtype)
    text = cuda_text(sparse_wgmma.matmul, x, packed)
    for selector in (0, 1):
        assert f"wgmma.mma_async.sp.sync.aligned.{instruction} " in text
        assert f", {selector}, add, 1, 1, 1, 0; }}" in text
    assert f"tensor<{batch}x256x" in text


@needs_kernel
def test_a_mapped_axis_joins_the_batch():
    xs = jnp.ones((5, 8, 64), jnp.bfloat16)
    text = cuda_text(jax.vmap(sparse_wgmma.matmul, (0, None)), xs, packed_leaf())
    assert "tensor<40x64xbf16>" in text


@pytest.mark.parametrize(
    ("weight", "shape", "dtype", "words"),
    [
        ({"pattern": "1:4"}, (8, 64), jnp.bfloat16, "2:4 weights, not 1:4"),
        ({"dtype": jnp.float32}, (8, 64), jnp.float32, "bfloat16 or float16"),
        ({}, (8, 64), jnp.float16, "the same dtype"),
        ({}, (8, 128), jnp.bfloat16, r"x should be \(batch, 64\)"),
        ({}, (64,), jnp.bfloat16, r"x should be \(batch, 64\)"),
        ({}, (12, 64), jnp.bfloat16, "multiple of 8, not 12; pad it"),
        ({}, (0, 64), jnp.bfloat16, "multiple of 8, not 0"),
        ({"shape": (96, 128)}, (8, 96), jnp.bfloat16, "inputs in multiples of 64"),
        ({"shape": (64, 192)}, (8, 64), jnp.bfloat16, "outputs in multiples of 128"),
    ],
)
def test_what_it_does_not_take_is_said(weight, shape, dtype, words):
    with pytest.raises(ValueError, match=f"sparse wgmma cannot multiply.*{words}"):
        sparse_wgmma.matmul(jnp.ones(shape, dtype), packed_leaf(**weight))


def test_words_of_another_weight_are_refused():
    words = position_words(packed_leaf(shape=(128, 128)))
    with pytest.raises(ValueError, match=r"uint32\(2, 2, 128\), expected uint32\(1, 2, 128\)"):
        sparse_wgmma.matmul(jnp.ones((8, 64), jnp.bfloat16), packed_leaf(), words)


def test_a_cpu_is_no_hopper():
    with pytest.raises(ValueError, match="not on an NVIDIA GPU"):
        sparse_wgmma.matmul(jnp.ones((8, 64), jnp.bfloat16), packed_leaf())


@pytest.mark.parametrize("missing", ["create_descriptor", "mma_utils"])
def test_a_jax_without_the_parts_is_named(monkeypatch, missing):
    monkeypatch.delitem(sys.modules, "nmjax.kernels.sparse_wgmma_kernel", raising=False)
    monkeypatch.delattr(nmjax.kernels, "sparse_wgmma_kernel", raising=False)
    if missing == "mma_utils":
        monkeypatch.setitem(sys.modules, "jax.experimental.mosaic.gpu.mma_utils", None)
    else:
        from jax.experimental.mosaic.gpu import mma_utils

        monkeypatch.delattr(mma_utils, missing)
    with pytest.raises(ValueError, match=rf"JAX {jax.__version__} lacks.*{missing}"):
        jax.eval_shape(sparse_wgmma.matmul, np.ones((8, 64), jnp.bfloat16), packed_leaf())
