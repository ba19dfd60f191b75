"""Loads the compiled kernels for CPUs, or says why they are missing."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

from nmjax.kernels.ffi_targets import register_handlers

HANDLERS = ("nmjax_blocks", "nmjax_blocks_int8", "nmjax_groups", "nmjax_integers")


@dataclass(frozen=True)
class Library:
    """Result of loading the kernels.

    Attributes:
      instruction_set: `"avx2"`, `"avx512"`, `"avx512_vnni"`, `"avx512_bf16"` or
        `"portable"`; None if not loaded.
      reason: why they are not loaded, and what to do; empty if they are.
    """

    instruction_set: str | None
    reason: str = ""


@functools.cache
def load_library() -> Library:
    """Loads the kernels and registers them with XLA, once; never raises."""
    if os.environ.get("NMJAX_DISABLE_FFI"):
        return Library(None, "switched off by NMJAX_DISABLE_FFI")
    from nmjax.kernels import build  # Here, so that it can be run as a module.

    path = Path(os.environ.get("NMJAX_KERNELS_LIBRARY", build.LIBRARY))
    if not path.exists():
        return Library(
            None,
            f"not built ({path} is missing): install nmjax where there is a C++ compiler, or run "
            "python -m nmjax.kernels.build",
        )
    try:
        library = ctypes.CDLL(str(path))
        register_handlers(library, HANDLERS, "cpu")
        library.nmjax_instruction_set.restype = ctypes.c_char_p
        picked = library.nmjax_instruction_set().decode()
        wanted = os.environ.get("NMJAX_KERNELS_ISA") or picked
        if wanted != picked:
            return Library(None, f"NMJAX_KERNELS_ISA is {wanted!r}; the widest here is {picked!r}")
        return Library(picked)
    except Exception as error:  # Whatever is wrong with a library, plain XLA still works.
        return Library(None, f"{path} does not load: {error}")
