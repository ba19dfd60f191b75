"""Compiles the C++ kernels, by the package's build or `python -m nmjax.kernels.build`.

The kernels for CPUs: every instruction set has its own object file, all in one library; the machine
picks when it runs. What NVIDIA's GPUs need is built where NVIDIA's headers are found: they come
with the extras `cuda13` and `cuda12`, or with the CUDA toolkit ($CUDA_HOME).

Nothing here imports JAX, so that the build needs no more than a compiler and XLA's headers.
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

_COMMON = ["blocks.cc", "groups.cc", "ffi.cc"]
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
# A vector type of the widest set in an inline function; a false alarm about _mm512_undefined.
_FLAGS += ["-Wno-psabi", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
_X86 = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
}
# Ampere, which later GPUs run too, and Hopper.
_GPUS = ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90,code=sm_90"]
# The first with the calls and the descriptors of today's (release notes of cuSPARSELt).
OLDEST_CUSPARSELT = (0, 8, 0)
INSTALL = "pip install 'nmjax[cuda13]' (or cuda12), or set CUDA_HOME"
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
            [compiler, *flags, *more, "-c", str(FOLDER / "cpu" / "src" / name), "-o", str(to)]
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


def compile_cusparselt(compiler: str, library: Path = CUSPARSELT_LIBRARY) -> Path:
    """Compiles the products by cuSPARSELt, whose own library is found when ours is loaded.

    Args:
      compiler: as for `compile_library`.
      library: the file to write; it appears whole or not at all.

    Returns:
      `library`.

    Raises:
      RuntimeError: a header is missing, or the compiler failed.
    """
    obstacle = why_no_cusparselt()
    if obstacle is not None:
        raise RuntimeError(obstacle)
    headers = [f"-isystem{folder}" for folder in (include_folder(), *nvidia_folders("include"))]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        linked = Path(folder) / library.name
        source = str(FOLDER / "gpu" / "src" / "cusparselt.cc")
        flags = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-shared", "-s"]
        _run([compiler, *flags, *headers, source, "-o", str(linked)])
        linked.replace(library)
    return library


def why_no_cusparselt() -> str | None:
    """Which of the headers that `compile_cusparselt` needs are missing or too old, or None."""
    folders = nvidia_folders("include")
    # cuSPARSELt 0.8 reads cuSPARSE's header; later ones bring what they need of it.
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
        return f"cusparseLt.h is of version {'.'.join(map(str, version))}, too old: {INSTALL}"
    return None


def compile_decode(library: Path = DECODE_LIBRARY) -> Path:
    """Compiles the kernel for few rows on NVIDIA's GPUs.

    Args:
      library: the file to write; it appears whole or not at all.

    Returns:
      `library`.

    Raises:
      RuntimeError: there is no nvcc, or it failed.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc: install the CUDA toolkit, and set CUDA_HOME")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        linked = Path(folder) / library.name
        sources = [str(FOLDER / "gpu" / "src" / name) for name in ("decode.cu", "decode_ffi.cc")]
        # All cores: every variant of the kernel is compiled for every GPU.
        flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC,-s", "--threads=0", *_GPUS]
        _run([nvcc, *flags, f"-I{include_folder()}", *sources, "-o", str(linked)])
        linked.replace(library)
    return library


def find_nvcc() -> str | None:
    """The path of CUDA's compiler, or None."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return str(home) if home.exists() else shutil.which("nvcc")


def nvidia_folders(kind: str) -> list[Path]:
    """Folders "include" or "lib" of NVIDIA's packages, then of the CUDA toolkit.

    Packages for CUDA 13 share the folder `nvidia/cu13`, for CUDA 12 each has its own. Where both
    are, those of the CUDA that JAX runs on come first.
    """
    spec = importlib.util.find_spec("nvidia")
    packages = (spec.submodule_search_locations if spec else None) or []
    found = [folder for place in packages for folder in sorted(Path(place).glob(f"*/{kind}"))]
    is_cuda12 = importlib.util.find_spec("jax_cuda12_plugin") is not None
    folders = sorted(found, key=lambda folder: (folder.parent.name == "cu13") == is_cuda12)
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    folders += [toolkit / kind, toolkit / f"{kind}64", toolkit / kind / "cccl"]
    return [folder for folder in folders if folder.is_dir()]


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
    """Compiles with $CXX or g++; `--sanitize FILE` makes a library that checks itself.

    `--cuda` makes only what is for GPUs, and fails where it cannot.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or "g++"
    if argv[:1] == ["--sanitize"]:
        compile_library(compiler, Path(argv[1]), SANITIZERS)
        return
    for_gpus_only = argv[:1] == ["--cuda"]
    if not for_gpus_only:
        compile_library(compiler)
    skipped = []
    if for_gpus_only or why_no_cusparselt() is None:
        compile_cusparselt(compiler)
    else:
        skipped.append(f"cuSPARSELt ({why_no_cusparselt()})")
    if for_gpus_only or find_nvcc():
        compile_decode()
    else:
        skipped.append("decode (no nvcc)")
    if skipped:
        sys.stderr.write(f"nmjax: not built, which only GPUs use: {', '.join(skipped)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
