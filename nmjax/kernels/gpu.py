"""Whether the device that JAX uses can run what is compiled for NVIDIA's GPUs."""

from __future__ import annotations

import jax


def why_no_gpu() -> str | None:
    """Why the device that JAX would use has no sparse tensor cores, or None."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"JAX runs on {device.device_kind} here, not on an NVIDIA GPU"
    capability = getattr(device, "compute_capability", None)
    if capability is None or float(capability) < 8:
        return f"{device.device_kind} has no sparse tensor cores; those came with Ampere"
    return None
