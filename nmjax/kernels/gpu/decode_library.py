"""The compiled kernel for few rows on NVIDIA's GPUs: whether it can be loaded here, or why not."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from nmjax.kernels.handlers import register_handlers


@functools.cache
def why_no_decode() -> str | None:
    """Loads the kernel and registers it with XLA, once; why it is not there, or None.

    A GPU is not needed for that: products on a machine without one fail when they run.
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
    return None
