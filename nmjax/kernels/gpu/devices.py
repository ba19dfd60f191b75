"""Whether the device that JAX uses can run what is compiled for NVIDIA GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def check_gpu(dtype: np.dtype | None = None) -> None:
    """Raises NotImplementedError unless JAX's device has sparse tensor cores for a dtype."""
    device = jax.devices()[0]
    kind, capability = device.device_kind, str(getattr(device, "compute_capability", ""))
    # AMD's compute capability is a name, not a number.
    if device.platform != "gpu" or not capability[:1].isdigit():
        raise NotImplementedError(f"JAX runs on {kind} here, not on an NVIDIA GPU")
    version = tuple(map(int, capability.split(".")))
    if version < (8, 0):
        raise NotImplementedError(f"{kind} has no sparse tensor cores; those came with Ampere")
    if dtype == jnp.float8_e4m3fn and version < (8, 9):
        raise NotImplementedError(
            f"{kind} has no tensor cores for {dtype}; those came with Ada and Hopper"
        )
