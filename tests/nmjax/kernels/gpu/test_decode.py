"""What the kernel for few rows is given and refused; no GPU is needed."""

import functools

import jax
import jax.numpy as jnp
import pytest

import nmjax
from nmjax.kernels.gpu import decode
from nmjax.kernels.gpu.decode_library import load_decode
from tests.nmjax.packed_weights import prune_and_pack


@pytest.fixture
def loaded(monkeypatch):
    """As on a machine that has the kernel."""
    monkeypatch.setattr(decode, "check_decode", lambda: None)


def packed_leaf(pattern="2:4", shape=(32, 16), dtype=jnp.bfloat16):
    params = {"kernel": jnp.ones(shape, dtype)}
    axes = nmjax.Axes((-2,), (-1,), tuple(range(-len(shape), -2)))
    return prune_and_pack(params, nmjax.make_plan(params, pattern, axes={"kernel": axes}))["kernel"]


def cuda_text(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_packed_arrays_go_to_the_kernel_as_they_are(loaded):
    x, packed = jnp.ones((3, 32), jnp.bfloat16), packed_leaf()
    decode.check(x.dtype, packed)
    call = functools.partial(decode.matmul, activation="relu")
    text = cuda_text(call, x, packed, jnp.ones(16))
    operands = "tensor<3x32xbf16>, tensor<8x2x16xbf16>, tensor<4x16xui8>, tensor<0xf32>"
    assert f"({operands}, tensor<16xf32>) -> tensor<3x16xbf16>" in text
    assert "relu = true" in text


def test_integers_go_with_their_scales(loaded):
    x, w = jnp.ones((3, 32), jnp.bfloat16), nmjax.quantize(packed_leaf())
    decode.check(x.dtype, w)
    text = cuda_text(decode.matmul, x, w)
    operands = "tensor<3x32xbf16>, tensor<8x2x16xi8>, tensor<4x16xui8>, tensor<16xf32>"
    assert f"({operands}, tensor<0xf32>) -> tensor<3x16xbf16>" in text
    assert "tensor<15x32xbf16>" in cuda_text(
        jax.vmap(decode.matmul, (0, None)), jnp.ones((5, 3, 32), jnp.bfloat16), w
    )


def test_a_mapped_axis_joins_the_batch(loaded):
    xs = jnp.ones((5, 3, 32), jnp.bfloat16)
    text = cuda_text(jax.vmap(decode.matmul, (0, None)), xs, packed_leaf())
    assert "tensor<15x32xbf16>" in text


@pytest.mark.parametrize(
    ("packed", "dtype", "words"),
    [
        (packed_leaf("1:4"), jnp.bfloat16, "not 1:4"),
        (packed_leaf(dtype=jnp.float32), jnp.float32, "float32"),
        (packed_leaf(), jnp.float16, "bfloat16 or float16 throughout"),
        (packed_leaf(shape=(24, 16)), jnp.bfloat16, "multiples of 16"),
        (packed_leaf(shape=(32, 8)), jnp.bfloat16, "multiples of 16"),
        (packed_leaf(shape=(3, 3, 32, 16)), jnp.bfloat16, "one matrix"),
        (packed_leaf("1x4@0.5"), jnp.bfloat16, "1x4@0.5"),
        (nmjax.quantize(packed_leaf()), jnp.float16, "bfloat16 by int8 values"),
        (nmjax.quantize(packed_leaf("1:4")), jnp.bfloat16, "not 1:4"),
        (nmjax.quantize(packed_leaf(shape=(24, 16))), jnp.bfloat16, "multiples of 16"),
    ],
)
def test_what_it_does_not_take_is_said(loaded, packed, dtype, words):
    x = jnp.ones((3, packed.shape[-2]), dtype)
    with pytest.raises(NotImplementedError, match=words):
        decode.matmul(x, packed)


def test_an_activation_it_does_not_know_is_refused(loaded):
    with pytest.raises(ValueError, match="got 'gelu'"):
        decode.matmul(jnp.ones((3, 32), jnp.bfloat16), packed_leaf(), activation="gelu")


def test_asking_for_it_without_a_gpu_is_an_error(loaded):
    x, packed = jnp.ones((3, 32), jnp.bfloat16), packed_leaf()
    with pytest.raises(NotImplementedError, match="not on an NVIDIA GPU"):
        nmjax.packed_matmul(x, packed, implementation="decode")


def test_why_it_is_not_there_is_said(monkeypatch, tmp_path):
    load_decode.cache_clear()
    monkeypatch.setenv("NMJAX_DECODE_LIBRARY", str(tmp_path / "missing.so"))
    assert "not built" in nmjax.backends()["decode"]
    with pytest.raises(NotImplementedError, match="not built"):
        nmjax.packed_matmul(jnp.ones((3, 32)), packed_leaf(), implementation="decode")
    load_decode.cache_clear()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setenv("NMJAX_DECODE_LIBRARY", str(broken))
    assert "does not load" in load_decode()
    monkeypatch.setenv("NMJAX_DISABLE_FFI", "1")
    load_decode.cache_clear()
    assert "NMJAX_DISABLE_FFI" in load_decode()
    monkeypatch.undo()
    load_decode.cache_clear()
