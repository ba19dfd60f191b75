"""Which devices run what is compiled for NVIDIA's GPUs."""

import jax

from nmjax.kernels.gpu import why_no_gpu


def test_a_cpu_is_none():
    assert "not on an NVIDIA GPU" in why_no_gpu()


def test_old_gpus_are_told_from_new_ones(monkeypatch):
    class Gpu:
        platform, device_kind = "gpu", "Tesla V100"

        def __init__(self, capability):
            self.compute_capability = capability

    monkeypatch.setattr(jax, "devices", lambda: [Gpu("7.0")])
    assert "V100 has no sparse tensor cores" in why_no_gpu()
    monkeypatch.setattr(jax, "devices", lambda: [Gpu("10.0")])
    assert why_no_gpu() is None
