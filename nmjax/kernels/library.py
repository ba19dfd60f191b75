"""The compiled kernels: where they are, whether this JAX can load them, and if not, why not."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jax

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

    `"xla"` is plain XLA, always there. `"ffi"` are the compiled kernels for CPUs. In the
    environment, `NMJAX_DISABLE_FFI` switches them off, `NMJAX_KERNELS_LIBRARY` names another
    library file, and `NMJAX_KERNELS_ISA` picks a narrower instruction set than the machine has.

    >>> sorted(backends())
    ['ffi', 'xla']
    """
    library = load_library()
    ffi = library.reason or f"ready: {library.instruction_set}"
    return {"xla": "ready: unpacks, or gathers where that is faster", "ffi": ffi}


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
        # A library of newer headers than XLA's own would keep the whole CPU backend from starting.
        built = library.nmjax_ffi_version()
        running = _version(build.include_folder() / "xla/ffi/api/c_api.h")
        if built // 1000 != running // 1000 or built > running:
            return Library(
                None,
                f"built for a newer XLA (FFI {built / 1000}, here {running / 1000}): run python -m "
                "nmjax.kernels.build, or upgrade jax",
            )
        for handler in HANDLERS:
            capsule = jax.ffi.pycapsule(getattr(library, handler))
            jax.ffi.register_ffi_target(handler, capsule, platform="cpu")
        library.nmjax_instruction_set.restype = ctypes.c_char_p
        picked = library.nmjax_instruction_set().decode()
        wanted = os.environ.get("NMJAX_KERNELS_ISA") or picked
        if wanted != picked:
            return Library(None, f"NMJAX_KERNELS_ISA is {wanted!r}; the widest here is {picked!r}")
        return Library(picked)
    except Exception as error:  # Whatever is wrong with a library, plain XLA still works.
        return Library(None, f"{path} does not load: {error}")


def _version(header: Path) -> int:
    """The FFI's version of the installed XLA, major * 1000 + minor."""
    text = header.read_text()
    parts = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(part.group(1)) if part else 0 for part in parts)
    return major * 1000 + minor
