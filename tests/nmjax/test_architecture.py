"""The plan of the house: imports go down, the root stays light, what is public is documented."""

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nmjax

ROOT = Path(__file__).parents[2]

# A file imports only from floors below its own. Files still to come have their place already.
FLOORS = {
    0: ("whole_files",),
    1: (
        "patterns",
        "trees",
        "tables",
        "layouts",
        "path_rules",
        "spans",
        "bits",
        "tensor_files",
        "ranking",
        "scores",
        "schedules",
        "shards",
        "timing",
        "straight_through",
    ),
    2: ("masks", "transposable", "blocks", "plans", "permute"),
    3: ("sparsify", "channels", "packed_nm", "packed_blocks"),
    4: ("sparsifiers", "transforms", "metrics", "cost", "packing", "sharding", "kernels"),
    5: (
        "soft_blocks",
        "matmul",
        "sparse_dense",
        "depthwise",
        "sizes",
        "files",
        "checkpoints",
        "interchange",
        "torch_layout",
        "plots",
    ),
    6: ("packed_linen", "batch_norm", "layer_times"),
    7: ("linen", "__main__"),
    8: ("__init__",),
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}

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
HEAVY = ("linen", "packed_linen", "batch_norm", "plots", "tensor_files", "checkpoints")
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


def test_imports_are_found():
    below_masks = {"nmjax.patterns", "nmjax.ranking", "nmjax.scores", "nmjax.shards"}
    assert imports("nmjax.masks") == below_masks
    assert "nmjax.plans" in imports("nmjax")


@pytest.mark.parametrize("name", LIBRARY)
def test_imports_go_down(name):
    part = name.split(".")[1]
    assert part in FLOOR_OF, f"give {part} a floor in this test and in the plan of the house"
    for imported in imports(name):
        assert imported.startswith("nmjax."), f"{name} imports {imported}"
        below = imported.split(".")[1]
        inside_one_folder = below == part and name.count(".") > 1
        assert inside_one_folder or FLOOR_OF[below] < FLOOR_OF[part], f"{name} imports {imported}"


def test_there_is_no_import_cycle():
    graph = {name: imports(name) & FILES.keys() for name in FILES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)


def test_the_root_defines_nothing():
    nodes = ast.parse(FILES["nmjax"].read_text()).body
    assert isinstance(nodes[0], ast.Expr)  # The docstring.
    assert all(isinstance(node, ast.ImportFrom) for node in nodes[1:])


@pytest.mark.parametrize(
    "name",
    [n for n in LIBRARY if n.split(".")[1] not in HEAVY],
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
