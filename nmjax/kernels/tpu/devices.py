"""Whether the device that JAX uses can run the kernels for TPUs."""

from __future__ import annotations

from importlib import metadata, util

import jax

# Older compilers have not been tried.
_OLDEST = (0, 0, 40)


def tpu_state() -> str:
    """Why the kernels for TPUs cannot run here; empty if they can."""
    if util.find_spec("jax.experimental.pallas") is None:
        return "this JAX has no Pallas"
    device = jax.devices()[0]
    if device.platform != "tpu":
        return f"JAX runs on {device.device_kind} here, not on a TPU"
    return _libtpu_state()


def check_tpu() -> None:
    """Raises NotImplementedError unless JAX's device can run the kernels for TPUs."""
    if state := tpu_state():
        raise NotImplementedError(state)


def _libtpu_state() -> str:
    try:
        version = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return ""  # It came with the machine, and its version is not known.
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return f"libtpu {version} is too old: the kernels need {oldest} or later"
    return ""
