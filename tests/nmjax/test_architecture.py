"""The layout of the code: imports go down, the root stays light, files stay short."""

import ast
import collections
import functools
import graphlib
import inspect
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
        ("_version", "trees", "tables", "layouts", "ste", "optax_chains"),
        ("masks", "tracing", "options"),
        ("patterns",),
        ("plans",),
        ("selection",),
        ("planning",),
        ("pruning",),
        ("transforms", "metrics", "allocation", "packed"),
        ("methods", "post_training"),
        ("files",),
        ("kernels",),
        ("analysis",),
        ("linen", "nnx", "__main__"),
        ("__init__",),
    ),
    "experiments": (
        ("data", "models", "json_files"),
        ("tasks",),
        ("distributed",),
        ("checkpointing",),
        ("training",),
        ("report",),
        ("ladder",),
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
DEEPEST = {"nmjax": 9, "experiments": 10}
FULLEST = 15  # files in a folder

# What `import nmjax` must not bring along: optional packages, and heavy parts of this one.
HEAVY = ("nmjax.linen", "nmjax.nnx", "nmjax.analysis.plots", "nmjax.files")
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
    # Results are data: one file for each benchmark.
    code = [Path(file) for file in files.stdout.split() if not file.endswith(".json")]
    folders = collections.Counter(str(file.parent) for file in code)
    assert {folder: count for folder, count in folders.items() if count > FULLEST} == {}


def test_no_module_is_named_like_a_public_function():
    modules = {name.rpartition(".")[2] for name in LIBRARY}
    functions = {name for name in nmjax.__all__ if inspect.isfunction(getattr(nmjax, name))}
    assert modules & functions == set()


def test_there_is_no_import_cycle():
    graph = {name: imports(name) & FILES.keys() for name in FILES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)


@pytest.mark.parametrize("name", [name for name, f in FILES.items() if f.name == "__init__.py"])
def test_packages_define_nothing(name):
    """They have a docstring, imports from other modules, and `__all__`."""
    nodes = ast.parse(FILES[name].read_text()).body
    if nodes:
        assert isinstance(nodes[0], ast.Expr)
    kinds = [type(node) for node in nodes[1:]]
    if kinds and kinds[-1] is ast.Assign:
        assert ast.unparse(nodes[-1]).startswith("__all__ = [")
        kinds.pop()
    assert set(kinds) <= {ast.ImportFrom}


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


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_say_what_they_are(name):
    tree = ast.parse(FILES[name].read_text())
    assert not tree.body or ast.get_docstring(tree)


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_never_asserts(name):
    asserts = [n for n in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(n, ast.Assert)]
    assert not asserts, "python -O switches them off; raise ValueError or TypeError"
