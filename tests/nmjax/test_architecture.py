"""The plan of the house: imports go down, the root stays light, what is public is documented."""

import ast
import collections
import functools
import graphlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nmjax

ROOT = Path(__file__).parents[2]

# A room is a file or a folder; it imports only from rooms on floors below its own. Inside a folder
# the files have floors too: there is no cycle of imports anywhere.
FLOORS = {
    "nmjax": (
        ("trees", "tables", "layouts", "ste"),
        ("masks", "tracing"),
        ("patterns",),
        ("plans",),
        ("pruning",),
        ("transforms", "metrics", "methods", "packed"),
        ("files",),
        ("kernels",),
        ("analysis",),
        ("linen", "__main__"),
        ("__init__",),
    ),
    "experiments": (
        ("data", "models"),
        ("tasks",),
        ("distributed",),
        ("checkpointing",),
        ("training",),
        ("report",),
        ("benchmarks", "compare", "train"),
        ("__init__",),
    ),
}
FLOOR_OF = {
    (package, room): floor
    for package, floors in FLOORS.items()
    for floor, rooms in enumerate(floors)
    for room in rooms
}
# Files in a chain of imports within a package, from the lowest to the highest.
DEEPEST = {"nmjax": 8, "experiments": 10}
FULLEST = 15  # files in a folder

PUBLIC = [
    "NM",
    "Block1xN",
    "Axes",
    "parse_pattern",
    "nm_mask",
    "block_mask",
    "prune_ste",
    "prune_sr_ste",
]
PUBLIC += ["make_plan", "Plan", "LeafPlan", "compute_masks", "sparsify", "prune"]
PUBLIC += ["add_sparse_refined", "Sparsifier", "straight_through", "one_shot", "dense"]
PUBLIC += ["pack", "unpack", "PackedNM", "PackedBlocks", "check_sparse", "sizes"]
PUBLIC += ["save_packed", "load_packed", "packed_matmul", "packed_conv", "backends"]
PUBLIC += ["unpack_slow", "check_sharding", "transposable_mask", "sparse_dense"]
PUBLIC += ["soft_uniform_blocks", "cubic_ramp", "linear_ramp", "cosine_ramp", "exponential_ramp"]
PUBLIC += ["Channels", "find_channels", "l1_order", "permute_channels", "sort_channels"]
PUBLIC += ["blocks_per_row", "row_balance", "blocks_regrown"]
PUBLIC += ["sad", "total_sad", "flip_rate", "density", "total_density", "cost"]

# What `import nmjax` must not bring along: optional packages, and heavy parts of this one.
HEAVY = ("nmjax.linen", "nmjax.analysis.plots", "nmjax.files")
OPTIONAL = ("flax", "matplotlib", "safetensors", "experiments", "tensorflow", "sklearn", "orbax")


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(f): f for p in ("nmjax", "experiments") for f in sorted(ROOT.glob(f"{p}/**/*.py"))
}
LIBRARY = [name for name in FILES if name.startswith("nmjax.")]


def imports(name):
    """Modules of this repository that a module imports."""
    tree = ast.parse(FILES[name].read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            as_modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (as_modules & FILES.keys()) or {node.module}
    return {module for module in found if module.split(".")[0] in ("nmjax", "experiments")}


def room(name):
    """The package, and the file or folder in it, that a module belongs to."""
    package, _, rest = name.partition(".")
    return package, rest.split(".")[0] or "__init__"


def is_below(lower, upper):
    return lower[0] == upper[0] and FLOOR_OF[lower] < FLOOR_OF[upper]


def test_imports_are_found():
    masks = {f"nmjax.masks.{name}" for name in ("ranking", "scores", "shards")}
    assert imports("nmjax.masks.nm") >= masks
    assert "nmjax.plans" in imports("nmjax")


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_down(name):
    here = room(name)
    assert here in FLOOR_OF, f"give {here} a floor in this test"
    for imported in imports(name):
        there = room(imported)
        if here[0] == "experiments" and there[0] == "nmjax":
            continue
        assert here == there or is_below(there, here), f"{name} imports {imported}"


@pytest.mark.parametrize("package", DEEPEST)
def test_chains_of_imports_are_short(package):
    @functools.cache
    def chain(name):
        own = [n for n in imports(name) & FILES.keys() if room(n)[0] == package]
        longest = max((chain(other) for other in own), key=len, default=())
        # What an `__init__` re-exports lies where it is defined.
        return longest if FILES[name].name == "__init__.py" else (*longest, name)

    longest = max((chain(name) for name in FILES if room(name)[0] == package), key=len)
    assert len(longest) <= DEEPEST[package], " > ".join(longest)


def test_no_folder_is_crowded():
    files = subprocess.run(
        ["git", "ls-files", "nmjax", "experiments"], cwd=ROOT, capture_output=True, text=True
    )
    folders = collections.Counter(str(Path(file).parent) for file in files.stdout.split())
    assert {folder: count for folder, count in folders.items() if count > FULLEST} == {}


def test_no_module_is_named_like_a_public_function():
    modules = {name.rpartition(".")[2] for name in LIBRARY}
    functions = {n for n, thing in public_objects().items() if inspect.isfunction(thing)}
    assert modules & functions == set()


def test_there_is_no_import_cycle():
    graph = {name: imports(name) & FILES.keys() for name in FILES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)


def test_the_root_defines_nothing():
    nodes = ast.parse(FILES["nmjax"].read_text()).body
    assert isinstance(nodes[0], ast.Expr)  # The docstring.
    assert all(isinstance(node, ast.ImportFrom) for node in nodes[1:])


@pytest.mark.parametrize(
    "name",
    [name for name in LIBRARY if not name.startswith(HEAVY)],
)
def test_core_files_import_nothing_optional(name):
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not [m for m in modules if m.split(".")[0] in OPTIONAL]


def test_importing_the_root_brings_nothing_optional():
    code = "import nmjax, sys; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = run.stdout.split()
    assert "optax" in loaded
    assert not set(OPTIONAL) & set(loaded)


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_stay_readable(name):
    assert len(FILES[name].read_text().splitlines()) <= 400


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist(name):
    assert hasattr(nmjax, name)


def public_objects():
    names = [n for n in vars(nmjax) if not n.startswith("_")]
    return {n: getattr(nmjax, n) for n in names if not inspect.ismodule(getattr(nmjax, n))}


@pytest.mark.parametrize("name", sorted(public_objects()))
def test_public_names_are_documented(name):
    thing = public_objects()[name]
    # Without a docstring of its own, a dataclass or NamedTuple gets its signature for one.
    assert inspect.getdoc(thing)
    assert not thing.__doc__.startswith(f"{thing.__name__}(")
    assert thing.__module__.startswith("nmjax.")


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_say_what_they_are(name):
    tree = ast.parse(FILES[name].read_text())
    assert not tree.body or ast.get_docstring(tree)


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_never_asserts(name):
    asserts = [n for n in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(n, ast.Assert)]
    assert not asserts, "python -O switches them off; raise ValueError or TypeError"


README = ROOT / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the README is not there")
def test_the_code_in_the_readme_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # It writes a file.
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    names = {"__name__": "readme"}
    printed = []
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        shown = capsys.readouterr().out
        comments = re.findall(r"^print.*\n((?:#.*\n)+)", block, re.MULTILINE)
        for comment in comments:
            expected = [line.removeprefix("#").removeprefix(" ") for line in comment.splitlines()]
            assert [line.rstrip() for line in shown.splitlines()] == expected
            printed.append(comment)
    assert printed  # The table of the plan, at least, is shown as it comes out.
