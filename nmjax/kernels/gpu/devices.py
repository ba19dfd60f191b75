"""Whether the device that JAX uses can run what is compiled for NVIDIA's GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def why_no_gpu(dtype: np.dtype | None = None) -> str | None:
    """Why the device that JAX would use has no sparse tensor cores for a dtype, or None."""
    device = jax.devices()[0]
    kind, capability = device.device_kind, str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not capability[:1].isdigit():  # AMD's is a name.
        return f"JAX runs on {kind} here, not on an NVIDIA GPU"
    version = tuple(map(int, capability.split(".")))
    if version < (8, 0):
        return f"{kind} has no sparse tensor cores; those came with Ampere"
    if dtype == jnp.float8_e4m3fn and version < (8, 9):
        return f"{kind} has no tensor cores for {dtype}; those came with Ada and Hopper"
    return None
