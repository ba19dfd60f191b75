"""Loads NVIDIA's cuSPARSELt and our calls of it, or says why they are missing."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nmjax.kernels.ffi_targets import register_handlers
from nmjax.kernels.gpu.algorithms import Algorithm

_NAME = "libcusparseLt.so.0"
HANDLERS = ("nmjax_cusparselt_compress", "nmjax_cusparselt_matmul", "nmjax_cusparselt_search")
_INITIALIZE = {
    "nmjax_cusparselt_compress": "nmjax_cusparselt_start",
    "nmjax_cusparselt_matmul": "nmjax_cusparselt_prepare",
}


@dataclass(frozen=True)
class CusparseLt:
    """Result of loading cuSPARSELt.

    Attributes:
      version: such as `"0.8.0"`; None if not loaded.
      reason: why it is not loaded, and what to do; empty if it is.
      library: our calls; None if not loaded.
    """

    version: str | None
    reason: str = ""
    library: ctypes.CDLL | None = None

    def found(self) -> Algorithm:
        """The kernel that the last search of this process found."""
        if self.library is None:
            raise RuntimeError(self.reason)
        four = np.zeros(4, np.int64)
        self.library.nmjax_cusparselt_found(four.ctypes.data_as(ctypes.c_void_p))
        return Algorithm(*map(int, four))


@functools.cache
def load_cusparselt() -> CusparseLt:
    """Loads cuSPARSELt and registers our calls of it with XLA, once; never raises.

    Loading needs no GPU: products on a machine without one fail when they run.
    """
    if os.environ.get("NMJAX_DISABLE_FFI"):
        return CusparseLt(None, "switched off by NMJAX_DISABLE_FFI")
    from nmjax.kernels import build  # Here, so that it can be run as a module.

    path = Path(os.environ.get("NMJAX_CUSPARSELT_LIBRARY", build.CUSPARSELT_LIBRARY))
    if not path.exists():
        obstacle = build.missing_headers()
        return CusparseLt(None, f"not built: {obstacle or 'run python -m nmjax.kernels.build'}")
    try:
        # Global, so that our library, which is not linked to it, finds its symbols.
        nvidia = ctypes.CDLL(_path_of_nvidia(build.nvidia_folders("lib")), ctypes.RTLD_GLOBAL)
        version = _version(nvidia)
    except (OSError, AttributeError) as error:
        return CusparseLt(None, f"{error}: {build.INSTALL}")
    if version < build.OLDEST_CUSPARSELT:
        # Its descriptors have other sizes, and it lacks functions that we call.
        return CusparseLt(None, f"cuSPARSELt {_text(version)} is too old: {build.INSTALL}")
    try:
        library = ctypes.CDLL(str(path))
        register_handlers(library, HANDLERS, "CUDA", initialize=_INITIALIZE)
        return CusparseLt(_text(version), library=library)
    except Exception as error:  # Whatever is wrong with a library, plain XLA still works.
        return CusparseLt(None, f"{path} does not load: {error}")


def _path_of_nvidia(folders: list[Path]) -> str:
    found = [folder / _NAME for folder in folders if (folder / _NAME).exists()]
    return str(found[0]) if found else _NAME


def _version(nvidia: ctypes.CDLL) -> tuple[int, ...]:
    parts = []
    for which in range(3):  # MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL
        number = ctypes.c_int()
        nvidia.cusparseLtGetProperty(which, ctypes.byref(number))
        parts.append(number.value)
    return tuple(parts)


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
