"""Compiles the C++ kernels, in the package's build or by `python -m nmjax.kernels.build`.

The CPU kernels are compiled once for each instruction set and linked into one library, which picks
the best set when it runs. The GPU kernels are built if NVIDIA's headers are found: they come with
the extras `cuda13` and `cuda12`, or with the CUDA toolkit ($CUDA_HOME).

This file must not import JAX: the package's build has only a compiler and XLA's headers.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "cpu" / "libnmjax_kernels.so"
CUSPARSELT_LIBRARY = FOLDER / "gpu" / "libnmjax_cusparselt.so"
DECODE_LIBRARY = FOLDER / "gpu" / "libnmjax_decode.so"

_COMMON = ["blocks.cc", "groups.cc", "integers.cc", "ffi.cc"]
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
# These warnings are false alarms: the ABI of wide vectors in inline functions, and
# _mm512_undefined, which is meant to be uninitialized. clang does not know the third one.
_FLAGS += ["-Wno-psabi", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
_X86 = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
}
# Code for Ampere, which later GPUs also run (as PTX), and for Hopper.
_GPUS = ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90,code=sm_90"]
# Earlier versions have other functions and descriptors (see cuSPARSELt's release notes).
OLDEST_CUSPARSELT = (0, 8, 0)
INSTALL = "pip install 'nmjax[cuda13]' (or cuda12), or set CUDA_HOME"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]


def compile_library(
    compiler: str, library: Path = LIBRARY, extra_flags: Sequence[str] = ()
) -> Path:
    """Compiles and links the CPU kernels.

    Args:
      compiler: path of a C++ compiler that accepts g++'s options.
      library: the file to write; a failed build leaves an older file in place.
      extra_flags: flags for every step, such as `SANITIZERS`.

    Returns:
      `library`.

    Raises:
      RuntimeError: the compiler failed; the message contains its output.
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = [*_FLAGS, *extra_flags, f"-isystem{include_folder()}", *(["-DNMJAX_X86"] * x86)]
    isas = {"portable": [], **(_X86 if x86 else {})}
    # Beside the library: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        sources: list[tuple[str, list[str], Path]] = [
            (name, [], Path(folder) / f"{name}.o") for name in _COMMON
        ]
        sources += [
            ("isa.cc", [*isa_flags, f"-DNMJAX_ISA={isa}"], Path(folder) / f"{isa}.o")
            for isa, isa_flags in isas.items()
        ]
        commands = [
            [compiler, *flags, *more, "-c", str(FOLDER / "cpu" / "src" / name), "-o", str(to)]
            for name, more, to in sources
        ]
        # Threads are enough, because each only waits for a compiler.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = Path(folder) / library.name
        # Sanitizers name functions, so their library keeps its symbols.
        strip = [] if extra_flags else ["-s"]
        objects = [str(to) for _, _, to in sources]
        _run([compiler, "-shared", *strip, *extra_flags, "-o", str(linked), *objects])
        linked.replace(library)
    return library


def compile_cusparselt(compiler: str, library: Path = CUSPARSELT_LIBRARY) -> Path:
    """Compiles the calls to cuSPARSELt. NVIDIA's library itself is loaded at run time.

    Args:
      compiler: as for `compile_library`.
      library: the file to write; a failed build leaves an older file in place.

    Returns:
      `library`.

    Raises:
      RuntimeError: a header is missing, or the compiler failed.
    """
    if missing := missing_headers():
        raise RuntimeError(missing)
    headers = [f"-isystem{folder}" for folder in (include_folder(), *nvidia_folders("include"))]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        linked = Path(folder) / library.name
        source = str(FOLDER / "gpu" / "src" / "cusparselt.cc")
        flags = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-shared", "-s"]
        _run([compiler, *flags, *headers, source, "-o", str(linked)])
        linked.replace(library)
    return library


def missing_headers() -> str:
    """Says which headers for `compile_cusparselt` are missing or too old; empty if none is."""
    folders = nvidia_folders("include")
    # cuSPARSELt 0.8 includes cuSPARSE's header; later versions ship a stub of it.
    wanted = (
        ("cusparseLt.h",),
        ("driver_types.h",),
        ("cusparse.h", "cusparseLt_cusparse_stub.h"),
    )
    missing = [
        " or ".join(names)
        for names in wanted
        if not any((folder / name).exists() for folder in folders for name in names)
    ]
    if missing:
        return f"{', '.join(missing)} not found: {INSTALL}"
    header = next(
        path for folder in folders if (path := folder / "cusparseLt.h").exists()
    ).read_text()
    parts = [
        re.search(rf"#define CUSPARSELT_VER_{part} +(\d+)", header)
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    version = tuple(int(part.group(1)) if part else 0 for part in parts)
    if version < OLDEST_CUSPARSELT:
        return f"cusparseLt.h has version {'.'.join(map(str, version))}, too old: {INSTALL}"
    return ""


def compile_decode(library: Path = DECODE_LIBRARY) -> Path:
    """Compiles the CUDA kernel for inputs with few rows.

    Args:
      library: the file to write; a failed build leaves an older file in place.

    Returns:
      `library`.

    Raises:
      RuntimeError: nvcc was not found, or it failed.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc not found: install the CUDA toolkit and set CUDA_HOME")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        linked = Path(folder) / library.name
        sources = [str(FOLDER / "gpu" / "src" / name) for name in ("decode.cu", "decode_ffi.cc")]
        # --threads=0 uses all cores: every variant of the kernel is compiled for every GPU.
        flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC,-s", "--threads=0", *_GPUS]
        _run([nvcc, *flags, f"-I{include_folder()}", *sources, "-o", str(linked)])
        linked.replace(library)
    return library


def find_nvcc() -> str | None:
    """Returns the path of CUDA's compiler, or None."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return str(home) if home.exists() else shutil.which("nvcc")


def nvidia_folders(kind: str) -> list[Path]:
    """Lists the "include" or "lib" folders of NVIDIA's packages, then of the CUDA toolkit.

    Packages for CUDA 13 share the folder `nvidia/cu13`; each package for CUDA 12 has its own. If
    both are installed, the CUDA version that JAX uses comes first.
    """
    spec = importlib.util.find_spec("nvidia")
    packages = (spec.submodule_search_locations if spec else None) or []
    found = [folder for place in packages for folder in sorted(Path(place).glob(f"*/{kind}"))]
    is_cuda12 = importlib.util.find_spec("jax_cuda12_plugin") is not None
    folders = sorted(found, key=lambda folder: (folder.parent.name == "cu13") == is_cuda12)
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    # The toolkit has "lib64" instead of "lib", and CUDA 13 moved C++ headers to "include/cccl".
    folders += [toolkit / kind, toolkit / f"{kind}64", toolkit / kind / "cccl"]
    return [folder for folder in folders if folder.is_dir()]


def include_folder() -> Path:
    """Returns the folder of XLA's headers, which the installed jaxlib contains.

    Raises:
      RuntimeError: jaxlib is not installed.
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
    """Compiles with $CXX or g++.

    `--sanitize FILE` writes a CPU library with sanitizers. `--cuda` builds only the GPU libraries,
    and fails if it cannot.
    """
    # Without either, running g++ fails with a message that names it.
    compiler = shutil.which(os.environ.get("CXX", "g++")) or "g++"
    if argv[:1] == ["--sanitize"]:
        compile_library(compiler, Path(argv[1]), SANITIZERS)
        return
    for_gpus_only = argv[:1] == ["--cuda"]
    if not for_gpus_only:
        compile_library(compiler)
    skipped = []
    if for_gpus_only or not missing_headers():
        compile_cusparselt(compiler)
    else:
        skipped.append(f"cuSPARSELt ({missing_headers()})")
    if for_gpus_only or find_nvcc():
        compile_decode()
    else:
        skipped.append("decode (nvcc not found)")
    if skipped:
        sys.stderr.write(f"nmjax: skipped these GPU libraries: {', '.join(skipped)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
