"""Registers the functions of a compiled library with XLA, unless this XLA is too old for them."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax


def register_handlers(
    library: ctypes.CDLL,
    handlers: Sequence[str],
    platform: str,
    *,
    initialize: Mapping[str, str] | None = None,
) -> None:
    """Registers FFI handlers under their own names.

    Args:
      library: exports the handlers, and `nmjax_ffi_version`.
      handlers: symbols.
      platform: `"cpu"` or `"CUDA"`.
      initialize: handler -> the symbol that XLA calls before it runs or records anything.

    Raises:
      RuntimeError: the library was compiled against newer headers than XLA's own.
      AttributeError: the library has no such handler.
    """
    from nmjax.kernels import build  # Here, so that it can be run as a module.

    # A handler from newer headers would keep the whole backend from starting.
    built = library.nmjax_ffi_version()
    running = _version(build.include_folder() / "xla/ffi/api/c_api.h")
    if built // 1000 != running // 1000 or built > running:
        raise RuntimeError(
            f"built for a newer XLA (FFI {built / 1000}, here {running / 1000}): run python -m "
            "nmjax.kernels.build, or upgrade jax"
        )
    for handler in handlers:
        stages = {"execute": jax.ffi.pycapsule(getattr(library, handler))}
        if initialize and handler in initialize:
            stages["initialize"] = jax.ffi.pycapsule(getattr(library, initialize[handler]))
        jax.ffi.register_ffi_target(handler, stages, platform=platform)


def _version(header: Path) -> int:
    """Version of the installed XLA's FFI, major * 1000 + minor."""
    text = header.read_text()
    parts = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(part.group(1)) if part else 0 for part in parts)
    return major * 1000 + minor
