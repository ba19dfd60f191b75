"""The compiled kernels: where they are, whether this JAX can load them, and if not, why not."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

from nmjax.kernels.gpu.cusparselt_library import load_cusparselt
from nmjax.kernels.gpu.decode_library import why_no_decode
from nmjax.kernels.handlers import register_handlers

HANDLERS = ("nmjax_blocks", "nmjax_groups")


@dataclass(frozen=True)
class Library:
    """What became of loading the kernels.

    Attributes:
      instruction_set: `"avx2"`, `"avx512"`, `"avx512_bf16"` or `"portable"`; None if not loaded.
      reason: why not, and what to do; empty if loaded.
    """

    instruction_set: str | None
    reason: str = ""

    @property
    def is_fast(self) -> bool:
        """Whether the kernels are loaded and use vectors wide enough to beat XLA's products."""
        return self.instruction_set not in (None, "portable")


def backends() -> dict[str, str]:
    """What can multiply packed weights here: name -> state, or why it is not there.

    `"xla"` is plain XLA, always there. `"ffi"` are the compiled kernels for CPUs. For 2:4
    weights on NVIDIA's GPUs, `"cusparselt"` is NVIDIA's library, and `"decode"` a kernel of ours
    for few rows. In the environment, `NMJAX_DISABLE_FFI` switches off all but the first,
    `NMJAX_KERNELS_LIBRARY` names another library file of kernels for CPUs, and `NMJAX_KERNELS_ISA`
    picks a narrower instruction set than the machine has.

    >>> sorted(backends())
    ['cusparselt', 'decode', 'ffi', 'xla']
    """
    library, cusparselt = load_library(), load_cusparselt()
    return {
        "xla": "ready: unpacks, or gathers where that is faster",
        "ffi": library.reason or f"ready: {library.instruction_set}",
        "cusparselt": cusparselt.reason or f"ready: {cusparselt.version}",
        "decode": why_no_decode() or "ready",
    }


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
