"""The command line and its files: pruned checkpoints, targets, hostile names, closed pipes."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import nmjax
from nmjax import __main__
from nmjax.__main__ import main
from nmjax.files.tensor_files import open_tensors, read_tensors, write_tensors
from nmjax.files.torch_layout import to_torch
from tests.nmjax.files.test_lazy_files import write_with_f4

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


PARAMS = {"fc": {"kernel": normal(16, 8), "bias": normal(8)}, "head": {"kernel": normal(8, 4)}}


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == (1 if err else 0), err
    return out, err


@pytest.fixture
def torch_file(tmp_path):
    write_tensors(tmp_path / "x.safetensors", to_torch(PARAMS), {"format": "pt", "by": "me"})
    return tmp_path / "x.safetensors"


# Dense checkpoints with zeros


def test_prune_writes_the_same_names_with_zeros(torch_file, tmp_path, capsys):
    out = tmp_path / "pruned.safetensors"
    text, _ = run(capsys, "prune", torch_file, "--pattern", "2:4", "--out", out)
    before, _ = read_tensors(torch_file)
    after, metadata = read_tensors(out)
    assert list(after) == list(before) == ["fc.bias", "fc.weight", "head.weight"]
    plan = nmjax.make_plan(PARAMS, "2:4")
    for name, array in to_torch(nmjax.prune(PARAMS, plan)).items():
        np.testing.assert_array_equal(after[name], array)
    assert (metadata["format"], metadata["by"]) == ("pt", "me")
    assert json.loads(metadata["nmjax"])["patterns"] == {"fc.weight": "2:4", "head.weight": "2:4"}
    assert "fc/weight" in text
    assert f"{out.stat().st_size:,} bytes" in text
    # It packs without pruning again.
    run(capsys, "pack", out, "--pattern", "2:4", "--out", tmp_path / "packed")


def test_prune_of_an_orbax_checkpoint(tmp_path, capsys):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", {"params": PARAMS, "step": np.int32(3)})
    out = tmp_path / "pruned"
    run(capsys, "prune", tmp_path / "x", "--pattern", "2:4", "--exclude", "head", "--out", out)
    pruned, _ = read_tensors(out)
    assert pruned.keys() == {"fc/bias", "fc/kernel", "head/kernel"}
    kept = (pruned["fc/kernel"].reshape(4, 4, 8) != 0).sum(1)
    np.testing.assert_array_equal(kept, 2)
    np.testing.assert_array_equal(pruned["head/kernel"], PARAMS["head"]["kernel"])


# The checkpoints of a run


def test_the_parameters_of_a_finished_run(tmp_path, capsys):
    state = {"state": {"train": {"params": PARAMS, "step": np.int32(3)}}, "checksums": np.ones(4)}
    folder = tmp_path / "run" / "checkpoints"
    with ocp.CheckpointManager(folder, item_names=("state", "about")) as manager:
        items = {"state": ocp.args.StandardSave(state), "about": ocp.args.JsonSave({"a": 1})}
        manager.save(20, args=ocp.args.Composite(**items))
    text, _ = run(capsys, "plan", folder / "20", "--pattern", "2:4")
    assert text.startswith("Only state/train/params is read")
    assert str(nmjax.make_plan(PARAMS, "2:4")) in text
    out = tmp_path / "packed"
    run(capsys, "pack", folder / "20", "--pattern", "2:4", "--prune", "--out", out)
    assert nmjax.load_packed(out).keys() == {"fc", "head"}
    _, err = run(capsys, "plan", tmp_path / "run", "--pattern", "2:4")
    assert f"pass one of them, such as {folder / '20'}" in err


# Integers of PyTorch


def test_counters_of_64_bits_do_not_stop_info_and_bench(tmp_path, capsys):
    state = to_torch(PARAMS) | {"bn.num_batches_tracked": np.int64(7), "ids": np.arange(8)[None]}
    write_tensors(tmp_path / "x", state, {"format": "pt"})
    out = tmp_path / "packed"
    run(capsys, "pack", tmp_path / "x", "--pattern", "2:4", "--prune", "--out", out)
    text, _ = run(capsys, "info", out)
    assert "bn/num_batches_tracked" in text
    text, _ = run(capsys, "bench", out)
    assert "fc/weight" in text
    with jax.enable_x64(False):
        loaded = nmjax.load_packed(out)
    assert loaded["bn"]["num_batches_tracked"] == 7
    assert loaded["ids"].tolist() == [list(range(8))]


# Tensors that cannot be read


def test_tensors_of_unknown_dtypes_are_named(tmp_path, capsys):
    write_with_f4(tmp_path / "x")
    for command in ("plan", "pack", "prune"):
        out = () if command == "plan" else ("--out", tmp_path / "out")
        prune = ("--prune",) if command == "pack" else ()
        text, _ = run(capsys, command, tmp_path / "x", "--pattern", "2:4", *out, *prune)
        if command == "prune":
            assert "b/blocks of dtype F4, which NumPy and JAX lack, is copied." in text
        else:
            assert "WARNING: b/blocks is left out, because NumPy and JAX have no F4." in text
    pruned = open_tensors(tmp_path / "out")
    assert pruned.tensors["b/blocks"][:2] == ((8,), "F4")
    assert b"".join(map(bytes, pruned.read_bytes("b/blocks"))) == b"1234"
    text, _ = run(capsys, "info", tmp_path / "x")
    (row,) = (line for line in text.splitlines() if line.startswith("b/blocks"))
    assert row.split() == ["b/blocks", "8", "F4", "4", "?"]


# Names in messages


def test_errors_say_that_dots_became_slashes(torch_file, tmp_path, capsys):
    _, err = run(capsys, "plan", torch_file, "--pattern", "2:4", "--exclude", "typo")
    assert "fc/weight" in err
    assert err.endswith("The names are PyTorch's, with slashes in place of dots.\n")
    write_tensors(tmp_path / "y", {"fc/kernel": normal(16, 8)}, {})
    _, err = run(capsys, "plan", tmp_path / "y", "--pattern", "2:4", "--exclude", "typo")
    assert "PyTorch" not in err


HOSTILE = "a\x1b[2J\u202e\r"


def test_names_and_metadata_are_printed_escaped(tmp_path, capsys):
    path = tmp_path / "x"
    write_tensors(path, {f"{HOSTILE}/kernel": normal(8, 4)}, {HOSTILE: f"text\n{HOSTILE}"})
    text, _ = run(capsys, "info", path)
    assert "a\\x1b[2J\\u202e\\r/kernel" in text
    assert "a\\x1b[2J\\u202e\\r: text\\na\\x1b[2J" in text
    errors = [run(capsys, "plan", path, "--pattern", "2:4")[1]]
    write_tensors(path, {f"a\x1b[2J/b{i}/kernel": normal(8, 4) for i in (1, 2)}, {})
    text, _ = run(capsys, "plan", path, "--pattern", "2:4")
    errors.append(run(capsys, "plan", path, "--pattern", "3:4", "--exclude", "typo")[1])
    nmjax.save_packed(path, {f"a\x1b[2J{i}": jnp.ones(2) for i in (1, 2)})
    text += run(capsys, "info", path)[0]
    for message in (text, *errors):
        assert "a\\x1b[2J" in message
        assert all(line.isprintable() for line in message.split("\n"))


def test_names_beyond_the_letters_of_the_terminal(tmp_path):
    write_tensors(tmp_path / "x", {"größe/kernel": normal(8, 4)}, {})
    done = subprocess.run(
        [sys.executable, "-m", "nmjax", "info", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert r"gr\xf6\xdfe/kernel" in done.stdout


def test_info_names_what_is_not_stored(tmp_path, capsys):
    tree = {"a": jnp.ones(2), "rng": jax.random.key(0), "act": jax.nn.relu, "rate": 0.5}
    nmjax.save_packed(tmp_path / "x", tree)
    text, _ = run(capsys, "info", tmp_path / "x")
    assert "Not stored, because they are not arrays: act, rate" in text
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["a", "rng", "total"]


# Where the output goes


@pytest.mark.parametrize("command", ["pack", "prune"])
def test_targets_are_checked_before_any_work(tmp_path, capsys, command):
    os.mkfifo(tmp_path / "pipe")
    for target, words in (
        (tmp_path / "pipe", "it exists, and is not a regular file"),
        ("/dev/null", "it exists, and is not a regular file"),
        (tmp_path, "it exists, and is not a regular file"),
        (tmp_path / "no" / "x", "no does not exist"),
    ):
        # The checkpoint is looked at later: it does not exist.
        _, err = run(capsys, command, tmp_path / "none", "--pattern", "2:4", "--out", target)
        assert words in err
        assert str(target) in err


def test_a_reader_that_has_enough(torch_file):
    """As `head -1`, which closes the pipe."""
    command = [
        sys.executable,
        "-c",
        "import sys; from nmjax.__main__ import main; sys.exit(main())",
    ]
    command += ["plan", str(torch_file), "--pattern", "2:4"]
    read, written = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            command, stdout=written, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(written)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (MemoryError("Unable to allocate 1 TiB"), 1, "error: there is not enough memory. Unable"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_ends_in_one_line(torch_file, capsys, monkeypatch, error, status, words):
    def fail(path):
        raise error

    monkeypatch.setattr(__main__, "open_checkpoint", fail)
    assert main(["plan", str(torch_file), "--pattern", "2:4"]) == status
    assert capsys.readouterr().err.startswith(words)


# Sizes


def test_sizes_of_groups_of_millions():
    """Binomial coefficients of such groups have hundreds of thousands of digits."""
    params = {"kernel": jnp.zeros((2_000_000, 1), jnp.float16)}
    plan = nmjax.make_plan(params, "1000000:2000000")
    shapes = jax.eval_shape(lambda: nmjax.pack(params, plan))
    leaf = nmjax.sizes(shapes).leaves["kernel"]
    assert 2_249_990 < leaf.least < 2_250_000  # A bit per weight, less log2(m) / 2.
