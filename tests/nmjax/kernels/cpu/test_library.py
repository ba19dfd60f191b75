"""Finding, loading and refusing the compiled kernels."""

import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest

import nmjax
from nmjax.kernels import build
from nmjax.kernels.cpu import library
from tests.nmjax.packed_weights import prune_and_pack


def backends_with(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    library.load_library.cache_clear()
    try:
        return nmjax.backends()["ffi"]
    finally:
        monkeypatch.undo()
        library.load_library.cache_clear()


def test_where_there_is_a_compiler_there_are_kernels():
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    assert nmjax.backends()["ffi"].startswith("ready: ")


def test_why_there_are_none_is_said(monkeypatch, tmp_path):
    assert "NMJAX_DISABLE_FFI" in backends_with(monkeypatch, NMJAX_DISABLE_FFI=1)
    missing = tmp_path / "missing.so"
    said = backends_with(monkeypatch, NMJAX_KERNELS_LIBRARY=missing)
    assert "not built" in said
    assert "nmjax.kernels.build" in said
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    assert "does not load" in backends_with(monkeypatch, NMJAX_KERNELS_LIBRARY=broken)


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch):
    if not nmjax.backends()["ffi"].startswith("ready: "):
        pytest.skip("no kernels")
    assert "'avx1024'; the widest here" in backends_with(monkeypatch, NMJAX_KERNELS_ISA="avx1024")


def test_a_library_of_newer_headers_is_refused(monkeypatch, tmp_path):
    source = tmp_path / "new.cc"
    source.write_text('extern "C" int nmjax_ffi_version() { return 999; }')
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    new = tmp_path / "new.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(new)], check=True)
    assert "newer XLA" in backends_with(monkeypatch, NMJAX_KERNELS_LIBRARY=new)


def test_asking_for_missing_kernels_is_an_error(monkeypatch):
    params = {"kernel": jnp.ones((8, 16))}
    packed = prune_and_pack(params, nmjax.make_plan(params, "2:4"))["kernel"]
    monkeypatch.setenv("NMJAX_DISABLE_FFI", "1")
    library.load_library.cache_clear()
    try:
        with pytest.raises(NotImplementedError, match="NMJAX_DISABLE_FFI"):
            nmjax.packed_matmul(jnp.ones((1, 8)), packed, implementation="ffi")
        nmjax.packed_matmul(jnp.ones((1, 8)), packed)
    finally:
        monkeypatch.undo()
        library.load_library.cache_clear()


def test_a_compiler_that_fails_is_quoted(tmp_path):
    with pytest.raises(RuntimeError, match="false"):
        build.compile_library("false", tmp_path / "library.so")
    assert not list(tmp_path.iterdir())


def test_the_build_needs_no_jax():
    code = "import sys, nmjax.kernels.build as b; print('jax' in sys.modules)"
    path = build.FOLDER / "build.py"
    code = f"import runpy, sys; runpy.run_path({str(path)!r}); print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
