"""What users see of the package: public names, help, version and console script."""

import importlib
import inspect
import pydoc
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nmjax
import nmjax.kernels
import nmjax.linen
import nmjax.methods
import nmjax.post_training
from nmjax.__main__ import main

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = (nmjax, nmjax.kernels, nmjax.linen, nmjax.methods, nmjax.post_training)

# Names that users rely on: removing one is a breaking change.
PROMISED = """
    NM Block1xN Axes parse_pattern nm_mask block_mask transposable_mask prune_ste prune_sr_ste
    make_plan Plan LeafPlan compute_masks sparsify prune check_sharding shard_plan
    add_sparse_refined allocate Sparsifier straight_through one_shot dense soft_uniform_blocks
    cubic_ramp linear_ramp cosine_ramp exponential_ramp
    pack unpack unpack_slow for_platform PackedNM TiledNM PackedBlocks check_sparse sizes
    quantize Quantized
    save_packed load_packed
    packed_matmul packed_conv backends
    Channels find_channels l1_order permute_channels sort_channels
    sad total_sad flip_rate density total_density cost blocks_per_row row_balance blocks_regrown
"""


@pytest.mark.parametrize("name", PROMISED.split())
def test_promised_names_are_public(name):
    assert name in nmjax.__all__


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_all_is_what_the_package_imports_from_elsewhere(package):
    imported = {
        name
        for name, thing in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    }
    assert set(package.__all__) == imported
    assert len(package.__all__) == len(imported)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_help_lists_every_public_name(package):
    text = pydoc.render_doc(package, renderer=pydoc.plaintext)
    lines = {line.strip(" |") for line in text.splitlines()}
    for name in package.__all__:
        heading = f"class {name}(" if inspect.isclass(getattr(package, name)) else f"{name}("
        assert any(line.startswith(heading) for line in lines), name


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in PACKAGES for name in package.__all__]
)
def test_public_names_are_documented(package, name):
    thing = getattr(package, name)
    # Without a docstring of its own, a dataclass or NamedTuple gets its signature for one.
    assert inspect.getdoc(thing)
    assert not thing.__doc__.startswith(f"{thing.__name__}(")
    assert thing.__module__.startswith("nmjax.")


def test_the_build_reads_the_version_from_the_file_that_defines_it():
    assert "version" in PYPROJECT["project"]["dynamic"]
    # Beside the package: it may be installed from a wheel.
    file = Path(nmjax.__file__).parents[1] / PYPROJECT["tool"]["hatch"]["version"]["path"]
    names = {}
    exec(file.read_text(), names)
    assert names["__version__"] == nmjax.__version__
    assert all(part.isdecimal() for part in nmjax.__version__.split(".")[:2])


def test_the_command_line_prints_the_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"nmjax {nmjax.__version__}\n"


def test_the_console_script_is_the_command_line():
    module, function = PYPROJECT["project"]["scripts"]["nmjax"].split(":")
    assert getattr(importlib.import_module(module), function) is main


def test_python_m_nmjax_prints_the_version():
    command = [sys.executable, "-m", "nmjax", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"nmjax {nmjax.__version__}\n"
