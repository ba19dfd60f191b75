"""Builds the C++ kernels when the package is installed; without a compiler it is installed without.

The library is loaded with ctypes and needs no Python headers, so one build fits all Pythons. It is
compiled against the headers of the oldest XLA that nmjax runs on: a newer one loads it, but an
older one would not load what was compiled against newer headers.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

OLDEST_XLA = "jaxlib==0.10.*"  # Its headers; dependencies of its own are not used.


class KernelsBuildHook(BuildHookInterface):
    """Compiles `nmjax/kernels/cpu/src` into a library beside it."""

    def dependencies(self) -> list[str]:
        """What the build needs: headers, if there is a compiler to read them."""
        return [OLDEST_XLA] if _compiler() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, and adds the library to the wheel; says why where it cannot."""
        del version
        if self.target_name != "wheel":
            return
        compiler = _compiler()
        if compiler is None:
            self.app.display_warning(
                "nmjax: no C++ compiler (g++, clang++ or $CXX) was found, so its CPU kernels are "
                "not built; plain XLA is used in their place"
            )
            return
        build = _build_module(Path(self.root))
        try:
            library = build.compile_library(compiler)
        except (OSError, RuntimeError) as error:
            self.app.display_warning(f"nmjax: the CPU kernels were not built: {error}")
            return
        build_data["artifacts"].append(f"/{library.relative_to(self.root).as_posix()}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"


def _compiler() -> str | None:
    if os.environ.get("NMJAX_DISABLE_FFI"):
        return None
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _platform_tag() -> str:
    from packaging.tags import platform_tags

    return next(iter(platform_tags()))


def _build_module(root: Path) -> Any:
    """`nmjax.kernels.build`, without importing nmjax and what that needs."""
    spec = importlib.util.spec_from_file_location("build", root / "nmjax/kernels/build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["build"] = module
    spec.loader.exec_module(module)
    return module
