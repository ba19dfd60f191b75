"""Finding, compiling, loading and refusing our calls of cuSPARSELt."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest

import nmjax
from nmjax.kernels import build
from nmjax.kernels.gpu import cusparselt_library as library_of_nvidia
from nmjax.kernels.gpu.cusparselt_library import HANDLERS, CusparseLt, load_cusparselt


@pytest.fixture
def fresh(monkeypatch):
    load_cusparselt.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    load_cusparselt.cache_clear()


def test_it_is_one_line_of_the_backends():
    state = nmjax.backends()["cusparselt"]
    assert state
    assert state.startswith("ready: ") == (load_cusparselt().library is not None)


def test_why_it_is_not_there_is_said(fresh, tmp_path):
    fresh.setenv("NMJAX_DISABLE_FFI", "1")
    assert "NMJAX_DISABLE_FFI" in nmjax.backends()["cusparselt"]
    fresh.delenv("NMJAX_DISABLE_FFI")
    load_cusparselt.cache_clear()
    fresh.setenv("NMJAX_CUSPARSELT_LIBRARY", str(tmp_path / "missing.so"))
    assert nmjax.backends()["cusparselt"].startswith("not built: ")
    with pytest.raises(RuntimeError, match="not built"):
        load_cusparselt().found()


def test_missing_headers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "nvidia_folders", lambda kind: [tmp_path])
    assert "cusparseLt.h, driver_types.h" in build.missing_headers()
    with pytest.raises(RuntimeError, match="nmjax\\[cuda13\\]"):
        build.compile_cusparselt("g++", tmp_path / "library.so")
    for name in ("driver_types.h", "cusparse.h"):
        (tmp_path / name).touch()
    header = tmp_path / "cusparseLt.h"
    for version, obstacle in ((7, "has version 0.7.1, too old: pip"), (8, None), (10, None)):
        lines = zip(("MAJOR", "MINOR", "PATCH"), (0, version, 1), strict=True)
        header.write_text("".join(f"#define CUSPARSELT_VER_{name} {n}\n" for name, n in lines))
        found = build.missing_headers()
        assert found == "" if obstacle is None else obstacle in found


def test_the_headers_of_the_cuda_that_jax_runs_on_come_first(monkeypatch, tmp_path):
    folders = [tmp_path / name / "include" for name in ("cu13", "cuda_runtime", "cusparselt")]
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    for plugins, first in (((), "cu13"), (("jax_cuda12_plugin",), "cuda_runtime")):

        def find_spec(name, plugins=plugins):
            if name == "nvidia":
                return SimpleNamespace(submodule_search_locations=[str(tmp_path)])
            return object() if name in plugins else None

        monkeypatch.setattr(build.importlib.util, "find_spec", find_spec)
        found = build.nvidia_folders("include")
        assert found[0].parent.name == first
        assert sorted(found) == folders


@pytest.mark.parametrize(
    ("version", "words"),
    [((0, 7, 1), "cuSPARSELt 0.7.1 is too old: pip install"), ((0, 8, 0), "does not load")],
)
def test_a_library_of_another_version_is_refused(fresh, tmp_path, version, words):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    source, theirs = tmp_path / "theirs.cc", tmp_path / "libcusparseLt.so.0"
    numbers = ", ".join(map(str, version))
    source.write_text(
        f"const int version[] = {{{numbers}}};"
        'extern "C" void cusparseLtGetProperty(int which, int* n) { *n = version[which]; }'
    )
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(theirs)], check=True)
    ours = tmp_path / "ours.so"
    ours.write_bytes(b"no library")
    fresh.setenv("NMJAX_CUSPARSELT_LIBRARY", str(ours))
    fresh.setattr(build, "nvidia_folders", lambda kind: [tmp_path])
    assert words in nmjax.backends()["cusparselt"]


def test_a_missing_library_is_named(fresh, tmp_path):
    ours = tmp_path / "ours.so"
    ours.write_bytes(b"no library")
    fresh.setenv("NMJAX_CUSPARSELT_LIBRARY", str(ours))
    fresh.setattr(library_of_nvidia, "_NAME", "libcusparseLt_missing.so.0")
    said = nmjax.backends()["cusparselt"]
    assert "libcusparseLt_missing.so.0" in said
    assert "pip install 'nmjax[cuda13]' (or cuda12)" in said


def test_it_compiles_and_loads(fresh, tmp_path):
    if shutil.which("g++") is None or build.missing_headers():
        pytest.skip(f"no g++, or {build.missing_headers()}")
    library = build.compile_cusparselt("g++", tmp_path / "library.so")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    before = ("nmjax_cusparselt_start", "nmjax_cusparselt_prepare")
    assert all(handler in symbols for handler in (*HANDLERS, *before))
    fresh.setenv("NMJAX_CUSPARSELT_LIBRARY", str(library))
    loaded = load_cusparselt()
    if loaded.library is None:
        assert "libcusparseLt" in loaded.reason
        return
    assert loaded.version.count(".") == 2
    assert loaded.found() == (-1, 1, 0, 0)


def test_a_broken_library_is_refused(fresh, tmp_path):
    if load_cusparselt().library is None:
        pytest.skip(nmjax.backends()["cusparselt"])
    load_cusparselt.cache_clear()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    fresh.setenv("NMJAX_CUSPARSELT_LIBRARY", str(broken))
    assert "does not load" in nmjax.backends()["cusparselt"]


def test_nothing_is_found_in_what_is_not_loaded():
    with pytest.raises(RuntimeError, match="because"):
        CusparseLt(None, "because").found()
