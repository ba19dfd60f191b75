"""Which devices run what is compiled for NVIDIA's GPUs."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from nmjax.kernels.gpu.devices import check_gpu


def test_a_cpu_is_none():
    with pytest.raises(NotImplementedError, match="not on an NVIDIA GPU"):
        check_gpu()


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "obstacle"),
    [
        ("Tesla V100", "7.0", None, "V100 has no sparse tensor cores; those came with Ampere"),
        ("NVIDIA A100", "8.0", None, None),
        ("NVIDIA A100", "8.0", jnp.float8_e4m3fn, "A100 has no tensor cores for float8_e4m3fn"),
        ("NVIDIA A100", "8.0", jnp.int8, None),
        ("NVIDIA L4", "8.9", jnp.float8_e4m3fn, None),
        ("NVIDIA H200", "9.0", jnp.float8_e4m3fn, None),
        ("NVIDIA B200", "10.0", None, None),
        ("AMD Instinct MI300X", "gfx942", None, "MI300X here, not on an NVIDIA GPU"),
    ],
)
def test_old_gpus_are_told_from_new_ones(monkeypatch, kind, capability, dtype, obstacle):
    class Gpu:
        platform, device_kind, compute_capability = "gpu", kind, capability

    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    refused = pytest.raises(NotImplementedError, match=obstacle)
    with contextlib.nullcontext() if obstacle is None else refused:
        check_gpu(None if dtype is None else jnp.dtype(dtype))
