"""Loads the compiled kernel for few rows on NVIDIA GPUs, or says why it is missing."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from nmjax.kernels.ffi_targets import register_handlers


@functools.cache
def load_decode() -> str:
    """Loads the kernel and registers it with XLA, once; never raises.

    Loading needs no GPU: products on a machine without one fail when they run.

    Returns:
      Why the kernel is missing, and what to do; empty if it is loaded.
    """
    if os.environ.get("NMJAX_DISABLE_FFI"):
        return "switched off by NMJAX_DISABLE_FFI"
    from nmjax.kernels import build  # Here, so that it can be run as a module.

    path = Path(os.environ.get("NMJAX_DECODE_LIBRARY", build.DECODE_LIBRARY))
    if not path.exists():
        todo = "run python -m nmjax.kernels.build"
        return f"not built: {todo if build.find_nvcc() else 'where there is nvcc, ' + todo}"
    try:
        register_handlers(ctypes.CDLL(str(path)), ("nmjax_decode",), "CUDA")
    except Exception as error:  # Whatever is wrong with a library, plain XLA still works.
        return f"{path} does not load: {error}"
    return ""


def check_decode() -> None:
    """Raises NotImplementedError if the kernel is not loaded."""
    if reason := load_decode():
        raise NotImplementedError(reason)
