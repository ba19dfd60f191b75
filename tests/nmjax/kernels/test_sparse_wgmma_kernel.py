"""Hopper's sparse product in JAX's interpreter of GPU kernels, with a stand-in for PTX."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.kernels import sparse_wgmma

if MISSING := sparse_wgmma.why_no_kernel():
    pytest.skip(MISSING, allow_module_level=True)
sparse_wgmma_kernel = importlib.import_module("nmjax.kernels.sparse_wgmma_kernel")
plgpu = sparse_wgmma_kernel.plgpu


def inlined(rows, dtype):
    """A step as `position_words` describes it, of 64 outputs and 64 inputs."""

    def step(sums, x, values, words):
        by_place = words[...].reshape(4, 8, 4)  # (warp, row, part)
        halves = jnp.stack([by_place & 0xFFFF, by_place >> 16], axis=1).reshape(64, 4, 1)
        groups = ((halves >> (4 * jnp.arange(4))) & 15).reshape(64, 16)
        places = jnp.stack([groups & 3, groups >> 2], axis=-1)
        kept = values[...].T.reshape(64, 16, 2, 1).astype(jnp.float32)
        w = jnp.where(places[..., None] == jnp.arange(4), kept, 0).sum(axis=2).reshape(64, 64)
        return sums + w @ x[...].T.astype(jnp.float32)

    return step


@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(24, 128, 256), (512, 64, 128)])
def test_every_block_is_computed_and_stored(monkeypatch, batch, inputs, outputs):
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"JAX {jax.__version__} has no interpreter of such kernels")
    kernel = plgpu.kernel

    def interpreted(*arguments, **settings):
        return kernel(*arguments, **settings, interpret=plgpu.InterpretGPUParams())

    monkeypatch.setattr(plgpu, "kernel", interpreted)
    monkeypatch.setattr(sparse_wgmma_kernel, "inlined", inlined)
    monkeypatch.setattr(sparse_wgmma, "why_no_wgmma", lambda: None)
    random = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(random.integers(-4, 5, (inputs, outputs)), jnp.bfloat16)}
    packed = nmjax.pack(params, nmjax.make_plan(params, "2:4"))["kernel"]
    x = jnp.asarray(random.integers(-1, 2, (batch, inputs)), jnp.bfloat16)
    expected = np.asarray(x, float) @ np.asarray(nmjax.unpack({"w": packed})["w"], float)
    assert np.abs(expected).max() <= 256  # Exact in bfloat16.
    np.testing.assert_array_equal(np.asarray(sparse_wgmma.matmul(x, packed), float), expected)
