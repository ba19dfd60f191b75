"""Compiles the C++ kernels, by the package's build or `python -m nmjax.kernels.build`.

Every instruction set has its own object file, all in one library; the machine picks when it runs.
Nothing here imports JAX, so that the build needs no more than a compiler and XLA's headers.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "libnmjax_kernels.so"

_COMMON = ["blocks.cc", "groups.cc", "ffi.cc"]
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
# A vector type of the widest set in an inline function; a false alarm about _mm512_undefined.
_FLAGS += ["-Wno-psabi", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
_X86 = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
}
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]


def compile_library(
    compiler: str, library: Path = LIBRARY, extra_flags: Sequence[str] = ()
) -> Path:
    """Compiles and links the kernels.

    Args:
      compiler: path of a C++ compiler that understands g++'s options.
      library: the file to write; it appears whole or not at all.
      extra_flags: for all steps, such as `SANITIZERS`.

    Returns:
      `library`.

    Raises:
      RuntimeError: the compiler failed; with what it said.
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = [*_FLAGS, *extra_flags, f"-isystem{include_folder()}", *(["-DNMJAX_X86"] * x86)]
    isas = {"portable": [], **(_X86 if x86 else {})}
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        sources: list[tuple[str, list[str], Path]] = [
            (name, [], Path(folder) / f"{name}.o") for name in _COMMON
        ]
        sources += [
            ("isa.cc", [*isa_flags, f"-DNMJAX_ISA={isa}"], Path(folder) / f"{isa}.o")
            for isa, isa_flags in isas.items()
        ]
        commands = [
            [compiler, *flags, *more, "-c", str(FOLDER / "src" / name), "-o", str(to)]
            for name, more, to in sources
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = Path(folder) / library.name
        strip = [] if extra_flags else ["-s"]
        objects = [str(to) for _, _, to in sources]
        _run([compiler, "-shared", *strip, *extra_flags, "-o", str(linked), *objects])
        linked.replace(library)
    return library


def include_folder() -> Path:
    """XLA's headers, from the jaxlib at hand.

    Raises:
      RuntimeError: there is no jaxlib.
    """
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        raise RuntimeError("XLA's headers come with jaxlib, which is not installed")
    return Path(spec.origin).parent / "include"


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def main(argv: Sequence[str]) -> None:
    """Compiles with $CXX or g++; `--sanitize FILE` makes a library that checks itself."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or "g++"
    if argv[:1] == ["--sanitize"]:
        compile_library(compiler, Path(argv[1]), SANITIZERS)
    else:
        compile_library(compiler)


if __name__ == "__main__":
    main(sys.argv[1:])
