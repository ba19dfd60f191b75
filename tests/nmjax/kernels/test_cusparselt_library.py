"""Finding, compiling, loading and refusing our calls of cuSPARSELt."""

import shutil
import subprocess

import pytest

import nmjax
from nmjax.kernels import build
from nmjax.kernels.cusparselt_library import HANDLERS, CusparseLt, load_cusparselt


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
    assert "cusparseLt.h, driver_types.h" in build.why_no_cusparselt()
    with pytest.raises(RuntimeError, match="nmjax\\[cuda13\\]"):
        build.compile_cusparselt("g++", tmp_path / "library.so")
    for name in ("cusparseLt.h", "driver_types.h", "cusparse.h"):
        (tmp_path / name).touch()
    assert build.why_no_cusparselt() is None


def test_it_compiles_and_loads(fresh, tmp_path):
    if shutil.which("g++") is None or build.why_no_cusparselt():
        pytest.skip(f"no g++, or {build.why_no_cusparselt()}")
    library = build.compile_cusparselt("g++", tmp_path / "library.so")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert all(handler in symbols for handler in (*HANDLERS, "nmjax_cusparselt_found"))
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
