"""Compiles the C++ kernels when the package is built. Without a compiler the build goes on without.

ctypes loads the library, which uses no Python headers, so one build fits all Python versions. It is
compiled against the headers of the oldest XLA that nmjax supports, because a newer XLA loads such a
library but an older XLA rejects one compiled against newer headers.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

OLDEST_XLA = "jaxlib==0.10.*"  # Only its headers are used, none of its dependencies.


class KernelsBuildHook(BuildHookInterface):
    """Compiles `nmjax/kernels/cpu/src` for a wheel, or in place for an editable install."""

    def dependencies(self) -> list[str]:
        """The headers that the compiler needs, if there is a compiler."""
        return [OLDEST_XLA] if _compiler() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles the library and adds it to the wheel; warns if that fails."""
        if self.target_name != "wheel":
            return
        compiler = _compiler()
        if compiler is None:
            self.app.display_warning(
                "nmjax: found no C++ compiler (g++, clang++ or $CXX), so the CPU kernels are not "
                "built; nmjax will use plain XLA instead"
            )
            return
        build = _build_module(Path(self.root))
        self.scratch = tempfile.TemporaryDirectory()
        # An editable install imports the package from the source tree, so the library goes there.
        # A wheel must leave the tree as it is: its kernels may be in use.
        editable = version == "editable"
        library = build.LIBRARY if editable else Path(self.scratch.name) / build.LIBRARY.name
        try:
            build.compile_library(compiler, library)
        except (OSError, RuntimeError) as error:
            self.app.display_warning(f"nmjax: the CPU kernels were not built: {error}")
            return
        if not editable:
            place = build.LIBRARY.relative_to(self.root).as_posix()
            build_data["force_include"][str(library)] = place
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Deletes the library that the wheel now contains."""
        del version, build_data, artifact_path
        if hasattr(self, "scratch"):
            self.scratch.cleanup()


def _compiler() -> str | None:
    if os.environ.get("NMJAX_DISABLE_FFI"):
        return None
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _platform_tag() -> str:
    from packaging.tags import platform_tags

    return next(iter(platform_tags()))


def _build_module(root: Path) -> Any:
    """Loads `nmjax.kernels.build` from its file: importing nmjax would need JAX."""
    spec = importlib.util.spec_from_file_location("build", root / "nmjax/kernels/build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["build"] = module
    spec.loader.exec_module(module)
    return module
