"""The command line on checkpoints in several files, and what it does tensor by tensor."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import nmjax
from nmjax.__main__ import main
from nmjax.files.checkpoints import read_checkpoint
from nmjax.files.tensor_files import open_tensors, read_tensors, write_tensors
from nmjax.files.tensorwise.packed_checkpoints import pack_in_slabs
from nmjax.files.tensorwise.pruned_checkpoints import prune_in_slabs
from nmjax.files.tensorwise.writing import write_parts
from nmjax.post_training import Statistics, sparse_gpt, wanda
from tests.nmjax.files.test_lazy_files import write_with_f4

RNG = np.random.default_rng(0)
NAMES = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def normal(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


SHARDS = [
    {"a.up_proj.weight": normal(8, 16, dtype=jnp.bfloat16), "a.norm.weight": normal(16)},
    {"head.weight": normal(12, 8), "b.q_proj.weight": normal(4, 8), "ids": np.arange(3)},
]


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == (1 if err else 0), err
    return out, err


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for i, (name, shard) in enumerate(zip(NAMES, SHARDS, strict=True)):
        write_tensors(folder / name, shard, {"format": "pt", "part": str(i)})
    files = {key: name for name, shard in zip(NAMES, SHARDS, strict=True) for key in shard}
    size = sum(array.nbytes for shard in SHARDS for array in shard.values())
    index = {"metadata": {"total_size": size, "by": "me"}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_pruned_into_the_same_shards(folder, tmp_path, capsys):
    options = ("--pattern", "2:4", "--exclude", "head", "--rule", "q_proj=1:4")
    out = tmp_path / "pruned"
    text, _ = run(capsys, "prune", folder, *options, "--out", out)
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((folder / index).read_text())
    for i, (name, shard) in enumerate(zip(NAMES, SHARDS, strict=True)):
        # By safetensors' own reader, as in other libraries.
        with safetensors.safe_open(out / name, framework="np") as file:
            assert file.metadata().items() >= {"format": "pt", "part": str(i)}.items()
        before, after = open_tensors(folder / name).tensors, open_tensors(out / name).tensors
        same = [(x.shape, x.code, x.nbytes) for x in before.values()]
        assert list(before) == list(after) == sorted(shard)
        assert [(x.shape, x.code, x.nbytes) for x in after.values()] == same
    assert f"{sum((out / name).stat().st_size for name in NAMES):,} bytes" in text
    whole = SHARDS[0] | SHARDS[1]
    plan = nmjax.make_plan(whole, "2:4", include=["up_proj"], axes={"up_proj": -1})
    narrow = nmjax.make_plan(whole, "1:4", include=["q_proj"], axes={"q_proj": -1})
    expected = nmjax.prune(nmjax.prune(jax.tree.map(np.asarray, whole), plan), narrow)
    found = {key: x for name in NAMES for key, x in read_tensors(out / name)[0].items()}
    jax.tree.map(np.testing.assert_array_equal, found, {k: np.asarray(expected[k]) for k in found})
    note = json.loads(read_tensors(out / NAMES[1])[1]["nmjax"])
    assert note["patterns"] == {"b.q_proj.weight": "1:4"}


def test_shards_become_one_file_and_are_packed(folder, tmp_path, capsys):
    index = folder / "model.safetensors.index.json"
    run(capsys, "prune", index, "--pattern", "2:4", "--out", tmp_path / "one.safetensors")
    run(capsys, "prune", folder, "--pattern", "2:4", "--out", tmp_path / "many")
    one, metadata = read_tensors(tmp_path / "one.safetensors")
    assert one.keys() == SHARDS[0].keys() | SHARDS[1].keys()
    assert metadata["part"] == "0"
    tree = read_checkpoint(tmp_path / "many")
    np.testing.assert_array_equal(tree["head"]["weight"], one["head.weight"])
    for command in ("plan", "info"):
        text, _ = run(capsys, command, index, *(["--pattern", "2:4"] if command == "plan" else []))
        assert "up_proj" in text
        assert "q_proj" in text
    # Leaf by leaf, the file is that of `save_packed`.
    run(capsys, "pack", tmp_path / "many", "--pattern", "2:4", "--out", tmp_path / "packed")
    plan = nmjax.make_plan(tree, "2:4")
    nmjax.save_packed(tmp_path / "whole", nmjax.pack(tree, plan))
    a, b = (read_tensors(tmp_path / name) for name in ("packed", "whole"))
    assert a[0].keys() == b[0].keys()
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])
    assert json.loads(a[1]["nmjax"]) == json.loads(b[1]["nmjax"])


def test_a_part_of_shards(tmp_path, capsys):
    write_with_f4(tmp_path / "x.safetensors")
    write_tensors(tmp_path / "y.safetensors", {"c/kernel": normal(8, 4)}, {})
    files = {"a/kernel": "x.safetensors", "b/blocks": "x.safetensors", "c/kernel": "y.safetensors"}
    index = tmp_path / "net.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 260}, "weight_map": files}))
    out = tmp_path / "out"
    run(capsys, "prune", index, "--pattern", "2:4", "--subtree", "c", "--out", out)
    assert json.loads((out / index.name).read_text()) == {
        "metadata": {"total_size": 128},
        "weight_map": {"c/kernel": "y.safetensors"},
    }
    assert sorted(path.name for path in out.iterdir()) == [index.name, "y.safetensors"]
    text, _ = run(capsys, "prune", index, "--pattern", "2:4", "--out", out)
    assert "b/blocks of dtype F4, which NumPy and JAX lack, is copied" in text
    assert json.loads((out / index.name).read_text())["weight_map"] == files


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("[1]", 'it has no "weight_map"'),
        ("{", "is not the index of a sharded checkpoint"),
        ({"a.kernel": "../x.safetensors"}, "is not the name of a file beside it"),
        ({"a.kernel": "y.safetensors"}, "y.safetensors does not exist"),
        ({"a.kernel": "x.safetensors"}, "disagree about which file holds b.kernel"),
        (
            dict.fromkeys(("a.kernel", "b.kernel", "c\x1b"), "x.safetensors"),
            r"holds c\x1b; download",
        ),
    ],
)
def test_an_index_that_is_damaged_or_forged(tmp_path, capsys, index, words):
    write_tensors(tmp_path / "x.safetensors", {f"{k}.kernel": normal(4, 4) for k in "ab"}, {})
    text = index if isinstance(index, str) else json.dumps({"weight_map": index})
    (tmp_path / "m.safetensors.index.json").write_text(text)
    _, err = run(capsys, "plan", tmp_path, "--pattern", "2:4")
    assert words in err


def test_shards_are_not_replaced(folder, tmp_path, capsys):
    command = ("prune", folder, "--pattern", "2:4", "--out")
    before = (folder / NAMES[0]).read_bytes()
    for out in (folder, folder / NAMES[0]):
        _, err = run(capsys, *command, out)
        assert f"--out {out} would replace the checkpoint" in err
    assert (folder / NAMES[0]).read_bytes() == before
    _, err = run(capsys, *command, tmp_path / "no" / "folder")
    assert f"folder {tmp_path / 'no'} does not exist" in err


@pytest.mark.parametrize(
    ("pattern", "axes", "shape"),
    [
        ("2:4", nmjax.Axes((-2,), (-1,), ()), (16, 12)),
        ("2:4", nmjax.Axes((-1,), (-2,), ()), (12, 16)),
        ("1:4/4", nmjax.Axes((-1,), (-2,), ()), (2, 32)),
        ("2:4/kernel", nmjax.Axes((-3,), (-4,), (-2, -1)), (6, 4, 3, 3)),
        ("2:4", nmjax.Axes((-3, -2), (-1,), ()), (4, 6, 3)),
        ("2:4", nmjax.Axes((-2,), (-1,), ()), (3, 8, 4)),
        ("1x4@0.5", nmjax.Axes((-1,), (-2,), ()), (16, 6)),
        ("1x2@0.5", nmjax.Axes((-2,), (-1,), (-3,)), (3, 6, 8)),
        ("1x4@0.5/layer", nmjax.Axes((-2,), (-1,), ()), (6, 16)),
    ],
)
def test_slabs_are_pruned_as_the_whole(pattern, axes, shape):
    w = normal(*shape)
    plan = nmjax.make_plan({"w": w}, pattern, axes={"w": axes})
    whole = np.asarray(nmjax.prune({"w": w}, plan)["w"])
    for slab in (1, w.nbytes // 3, w.nbytes):
        np.testing.assert_array_equal(prune_in_slabs(plan["w"], w.copy(), slab), whole)


@pytest.mark.parametrize(
    ("pattern", "axes", "shape"),
    [
        ("2:4", nmjax.Axes((-2,), (-1,)), (8, 6)),
        ("2:4", nmjax.Axes((-1,), (-2,)), (6, 8)),
        ("3:5", nmjax.Axes((-3,), (-2, -1)), (10, 4, 3)),
        ("2:4/2", nmjax.Axes((-2,), (-1,)), (2, 8, 6)),
        ("1:4", nmjax.Axes((-2,), (-1,), (-3,)), (3, 8, 6)),
        ("1x2@0.5", nmjax.Axes((-2,), (-1,), (-3,)), (3, 6, 8)),
        ("1x4@0.5", nmjax.Axes((-3,), (-2, -1), ()), (6, 4, 4)),
        ("1x4@0.5/layer", nmjax.Axes((-2,), (-1,), ()), (6, 16)),
    ],
)
def test_slabs_are_packed_as_the_whole(pattern, axes, shape):
    w = normal(*shape)
    plan = nmjax.make_plan({"w": w}, pattern, axes={"w": axes})
    w = np.asarray(nmjax.prune({"w": w}, plan)["w"])
    whole = nmjax.pack({"w": w}, plan)["w"]
    for slab in (1, w.nbytes // 3, w.nbytes):
        packed = pack_in_slabs("w", plan["w"], w, slab)
        assert packed.leaf_plan == whole.leaf_plan
        jax.tree.map(np.testing.assert_array_equal, packed, whole)


# Statistics


@pytest.mark.parametrize("method", ["wanda", "sparse_gpt"])
def test_statistics_from_a_file(tmp_path, capsys, method):
    x, w = normal(64, 16) * np.linspace(0.1, 3, 16, dtype=np.float32), normal(8, 16)
    gram = x.T @ x / len(x)
    write_tensors(tmp_path / "x", {"fc.weight": w, "fc.bias": normal(8)}, {"format": "pt"})
    out, statistics = tmp_path / "out", tmp_path / "statistics"
    command = ("prune", tmp_path / "x", "--pattern", "2:4", "--out", out, "--method", method)
    write_tensors(statistics, {"fc.weight": gram}, {})
    run(capsys, *command, "--statistics", statistics)
    params = {"fc": {"weight": w}}
    plan = nmjax.make_plan(params, "2:4", axes={"weight": -1})
    known = Statistics({"fc/weight": jnp.asarray(gram)[None]}, {"fc/weight": jnp.ones(1)})
    function = {"wanda": wanda, "sparse_gpt": sparse_gpt}[method]
    expected = np.asarray(function(params, plan, known)["fc"]["weight"])
    np.testing.assert_allclose(read_tensors(out)[0]["fc.weight"], expected, atol=1e-5)
    assert (expected != nmjax.prune(params, plan)["fc"]["weight"]).any()
    write_tensors(statistics, {"fc.weight": gram.diagonal().copy()}, {})
    _, err = run(capsys, *command, "--statistics", statistics)
    if method == "wanda":
        np.testing.assert_array_equal(read_tensors(out)[0]["fc.weight"], expected)
    else:
        assert "fc.weight: has the shape (16,); expected (16, 16)" in err
    write_tensors(statistics, {"fc": gram}, {})
    _, err = run(capsys, *command, "--statistics", statistics)
    assert "fc.weight: missing; expected the shape" in err
    _, err = run(capsys, *command)
    assert f"--method {method} needs --statistics" in err


# Tensor by tensor


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([("a", [np.ones(2)]), ("a", [np.ones(2)])], "written twice"),
        ([("a", [np.ones(1)])], "should have 16 bytes"),
        ([("a", [np.ones(1), np.ones(2)])], "should have 16 bytes"),
        ([], "missing"),
    ],
)
def test_parts_that_do_not_fit_the_header(tmp_path, parts, words):
    write_tensors(tmp_path / "x", {"a": np.zeros(2)}, {})
    header = open_tensors(tmp_path / "x").tensors
    with pytest.raises(ValueError, match=words):
        write_parts(tmp_path / "y", header, parts, {})
    assert not (tmp_path / "y").exists()


_PEAK = """
import sys
from nmjax.__main__ import main
assert main(sys.argv[1:]) == 0
lines = open("/proc/self/status").read().splitlines()
print(*(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path):
    few, many = 2, 24
    weight = normal(2048, 2048)
    peaks = {}
    for count in (few, many):
        folder = tmp_path / str(count)
        folder.mkdir()
        files = {f"layers.{i}.up_proj.weight": f"{i}.safetensors" for i in range(count)}
        for name, file in files.items():
            write_tensors(folder / file, {name: weight}, {"format": "pt"})
        (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        for command in ("plan", "info", "prune", "pack"):
            pattern = [] if command == "info" else ["--pattern", "2:4"]
            out = {"prune": ["--out", f"{folder}-out"], "pack": ["--prune", "--out", f"{folder}-p"]}
            arguments = [command, str(folder), *pattern, *out.get(command, [])]
            done = subprocess.run(
                [sys.executable, "-c", _PEAK, *arguments],
                capture_output=True,
                text=True,
                check=True,
            )
            peaks[command, count] = int(done.stdout.split()[-1]) * 1024
    # 22 more tensors, and allocators keep the memory of a few for later.
    for command in ("plan", "info", "prune", "pack"):
        assert peaks[command, many] < peaks[command, few] + 8 * weight.nbytes, (command, peaks)
    assert peaks["info", many] < peaks["plan", many] + 3 * weight.nbytes
