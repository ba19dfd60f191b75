"""The command line, from checkpoint to packed file."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.__main__ import main
from nmjax.files.tensor_files import write_tensors
from nmjax.trees.leaves import named_leaves
from tests.nmjax.packed_weights import prune_and_pack

RNG = np.random.default_rng(0)
PARAMS = {
    "stem": {
        "kernel": RNG.normal(size=(3, 3, 3, 8)).astype("float32"),
        "bias": np.zeros(8, "float32"),
    },
    "body": {"kernel": RNG.normal(size=(16, 8)).astype("float32"), "bias": np.zeros(8, "float32")},
    "head": {"kernel": RNG.normal(size=(8, 4)).astype("float32")},
}
PLAN = nmjax.make_plan(PARAMS, "2:4", exclude="stem")


@pytest.fixture
def files(tmp_path):
    """A dense checkpoint, a pruned one, and where to write."""
    dense, pruned = tmp_path / "dense.safetensors", tmp_path / "pruned.npz"
    write_tensors(dense, named_leaves(PARAMS), {})
    np.savez(pruned, **named_leaves(nmjax.prune(PARAMS, PLAN)))
    return str(dense), str(pruned), str(tmp_path / "packed.safetensors")


def run(capsys, *arguments):
    status = main(arguments)
    out, err = capsys.readouterr()
    assert status == (1 if err else 0), err
    return out, err


def test_pruned_weights_are_packed(files, capsys):
    _, pruned, out = files
    text, _ = run(capsys, "pack", pruned, "--pattern", "2:4", "--exclude", "stem", "--out", out)
    loaded = nmjax.load_packed(out)
    jax.tree.map(np.testing.assert_array_equal, nmjax.unpack(loaded), nmjax.prune(PARAMS, PLAN))
    assert str(nmjax.sizes(loaded)) in text
    assert f"{Path(out).stat().st_size:,} bytes" in text


def test_packed_weights_are_quantized(files, capsys):
    _, pruned, out = files
    command = ("pack", pruned, "--pattern", "2:4", "--exclude", "stem", "--out", out)
    text, _ = run(capsys, *command, "--quantize", "int8")
    expected = nmjax.quantize(prune_and_pack(PARAMS, PLAN))
    loaded = nmjax.load_packed(out)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert str(nmjax.sizes(expected)) in text
    assert str(nmjax.sizes(expected)) in run(capsys, "info", out)[0]


@pytest.mark.parametrize("command", ["prune", "pack"])
@pytest.mark.parametrize("through_link", [False, True])
def test_the_checkpoint_is_not_replaced(tmp_path, capsys, command, through_link):
    checkpoint = out = tmp_path / "a.safetensors"
    write_tensors(checkpoint, {"body/kernel": PARAMS["body"]["kernel"]}, {})
    before = checkpoint.read_bytes()
    if through_link:
        out = tmp_path / "link"
        out.symlink_to(checkpoint)
    more = ["--prune"] if command == "pack" else []
    _, err = run(capsys, command, str(checkpoint), "--pattern", "2:4", *more, "--out", str(out))
    assert f"--out {out} would replace the checkpoint {checkpoint}: choose another file" in err
    assert checkpoint.read_bytes() == before


def test_weights_that_are_not_sparse_are_refused_by_name(files, capsys):
    dense, _, out = files
    command = ("pack", dense, "--pattern", "2:4", "--exclude", "stem", "--out", out)
    _, err = run(capsys, *command)
    assert "body/kernel (16, 8): 32 of 32 groups keep more than 2:4" in err
    assert "head/kernel (8, 4): 8 of 8 groups keep more than 2:4" in err
    assert "these weights are not sparse yet; pass --prune to prune them by magnitude" in err
    assert "nmjax.prune" not in err
    assert not Path(out).exists()
    run(capsys, *command, "--prune")
    loaded = nmjax.unpack(nmjax.load_packed(out))
    jax.tree.map(np.testing.assert_array_equal, loaded, nmjax.prune(PARAMS, PLAN))


def test_layers_that_do_not_divide(files, capsys):
    dense, _, out = files
    command = ("pack", dense, "--pattern", "2:4", "--prune", "--out", out)
    _, err = run(capsys, *command)
    assert "stem/kernel (3, 3, 3, 8): 3 inputs are not a multiple of 4" in err
    assert "List them in --exclude, or pass --dense-if-indivisible" in err
    run(capsys, *command, "--dense-if-indivisible")
    assert set(nmjax.sizes(nmjax.load_packed(out)).leaves) == set(named_leaves(PARAMS))


def test_rules(files, capsys):
    dense, _, out = files
    rules = ("--rule", "head=1x4@0.5", "--rule", "stem=dense")
    run(capsys, "pack", dense, "--pattern", "1:8", *rules, "--prune", "--out", out)
    patterns = {
        name: leaf.pattern for name, leaf in nmjax.sizes(nmjax.load_packed(out)).leaves.items()
    }
    assert patterns == {
        "body/bias": "dense",
        "body/kernel": "1:8",
        "head/kernel": "1x4@0.5",
        "stem/bias": "dense",
        "stem/kernel": "dense",
    }
    _, err = run(capsys, "plan", dense, "--pattern", "1:8", "--rule", "head")
    assert "RULE=PATTERN" in err


def test_plan_says_what_and_why_not(files, capsys):
    text, _ = run(capsys, "plan", files[0], "--pattern", "2:4")
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert "3 inputs are not a multiple of 4" in text
    assert "bias" in rows["body/bias"]
    plan = nmjax.make_plan(PARAMS, "2:4", on_indivisible="dense")
    assert str(plan) in text
    assert str(nmjax.sizes(prune_and_pack(PARAMS, plan))) in text
    products = text.split("because")[1].splitlines()
    assert {line.split()[0] for line in products if "/kernel" in line} == set(plan)
    assert "nmjax bench" in products[-1]


OUT_IN = {
    "mlp": {"kernel": RNG.normal(size=(8, 4)).astype("float32"), "bias": np.zeros(8, "float32")},
    "head": {"w": RNG.normal(size=(4, 8)).astype("float32")},
}


@pytest.fixture
def out_in(tmp_path):
    """A checkpoint with a kernel (out, in), and where to write."""
    write_tensors(tmp_path / "dense.safetensors", named_leaves(OUT_IN), {})
    return str(tmp_path / "dense.safetensors"), str(tmp_path / "packed.safetensors")


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("-1", -1),
        ("1", 1),
        ("-2,-1", (-2, -1)),
        ("-1/-2/", nmjax.Axes((-1,), (-2,))),
        ("-1/-2", nmjax.Axes((-1,), (-2,))),
    ],
)
def test_given_axes(out_in, capsys, text, axes):
    dense, out = out_in
    command = ("pack", dense, "--pattern", "2:4", "--prune", "--out", out)
    run(capsys, *command, "--axes", f"mlp/kernel={text}", "--axes", "head=-2")
    plan = nmjax.make_plan(OUT_IN, "2:4", axes={"mlp/kernel": axes, "head": -2})
    loaded = nmjax.unpack(nmjax.load_packed(out))
    jax.tree.map(np.testing.assert_array_equal, loaded, nmjax.prune(OUT_IN, plan))
    table, _ = run(capsys, "plan", dense, "--pattern", "2:4", "--axes", f"mlp/kernel={text}")
    (row,) = (line for line in table.splitlines() if line.startswith("mlp/kernel  8x4"))
    assert plan["mlp/kernel"].span in row


def test_given_axes_of_blocks(tmp_path, capsys):
    params = {"a.b/kernel": RNG.normal(size=(3, 8, 4)).astype("float32")}
    write_tensors(tmp_path / "x", params, {})
    command = ("plan", str(tmp_path / "x"), "--pattern", "1x2@0.5", "--axes")
    _, err = run(capsys, *command, "kernel=-2")
    assert "--axes 'a.b/kernel$=REDUCTION/OUTPUT/TAPS'" in err
    text, _ = run(capsys, *command, "kernel=-2/-1/-3")
    assert "-2 x -1" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mlp", "--axes must be RULE=AXES, such as 'head/kernel=-2', got 'mlp'"),
        ("mlp=in", "got 'in'"),
        ("mlp=-1/-2/-3/-4", "got '-1/-2/-3/-4'"),
        ("mlp=-１", "got '-１'"),
        ("mlp/kernel=-3", "--axes 'mlp/kernel=-3' does not fit mlp/kernel of shape (8, 4)"),
        ("typo=-1", "match no leaf: 'typo'"),
    ],
)
def test_axes_that_do_not_fit(out_in, capsys, text, words):
    _, err = run(capsys, "plan", out_in[0], "--pattern", "2:4", "--axes", text)
    assert words in err


def test_advice_names_options(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", **{"a/kernel": np.zeros((8, 4), int)})
    for command in ("plan", "pack"):
        more = ("--out", str(tmp_path / "y"), "--prune") if command == "pack" else ()
        _, err = run(capsys, command, str(tmp_path / "x.npz"), "--pattern", "2:4", *more)
        assert "a/kernel has dtype int64" in err
        assert "List them in --exclude" in err
        assert "exclude=" not in err


def test_only_the_params_of_a_training_state(tmp_path, capsys):
    params = named_leaves(PARAMS)
    state = {
        **{f"state/params/{name}": leaf for name, leaf in params.items()},
        **{f"state/opt_state/0/mu/{name}": leaf for name, leaf in params.items()},
    }
    write_tensors(tmp_path / "x", state, {})
    command = ("plan", str(tmp_path / "x"), "--pattern", "2:4")
    text, _ = run(capsys, *command)
    assert text.startswith("Only state/params is read; the rest of the checkpoint is left out.")
    alone, _ = run(capsys, *command, "--subtree", "state/params")
    assert text.endswith(alone)
    assert str(nmjax.make_plan(PARAMS, "2:4", on_indivisible="dense")) in alone
    whole, _ = run(capsys, *command, "--subtree", "")
    assert "state/opt_state/0/mu/body/kernel" in whole
    out = str(tmp_path / "y")
    run(capsys, "pack", *command[1:], "--exclude", "stem", "--prune", "--out", out)
    assert named_leaves(nmjax.unpack(nmjax.load_packed(out))).keys() == params.keys()
    write_tensors(
        tmp_path / "x", {name.replace("params", "net"): leaf for name, leaf in state.items()}, {}
    )
    _, err = run(capsys, *command)
    assert "pass --subtree with the part" in err


def test_info(files, capsys):
    dense, _, out = files
    text, _ = run(capsys, "info", dense)
    assert text.splitlines()[0].split() == ["tensor", "shape", "dtype", "bytes", "zeros"]
    assert text.splitlines()[2].split() == ["body/bias", "8", "float32", "32", "100.0%"]
    run(capsys, "pack", dense, "--pattern", "2:4", "--exclude", "stem", "--prune", "--out", out)
    text, _ = run(capsys, "info", out)
    assert str(nmjax.sizes(nmjax.load_packed(out))) in text
    ways = [line.split()[:2] for line in text.split("because")[1].splitlines() if "/kernel" in line]
    assert {way for _, way in ways} <= {"ffi", "gather", "row_by_row", "xla"}
    assert "body/kernel" in {name for name, _ in ways}


@pytest.mark.parametrize("pattern", ["2:4", "1x16@0.75", "1x16@0.75/layer"])
def test_a_stack_of_layers_is_multiplied_as_its_layers_are(tmp_path, capsys, pattern):
    lines = []
    for stack in ((), (4,)):
        params = {"kernel": jnp.ones((*stack, 16, 32)), "bias": jnp.ones((*stack, 32))}
        out = str(tmp_path / "packed.safetensors")
        nmjax.save_packed(out, prune_and_pack(params, nmjax.make_plan(params, pattern)))
        text, _ = run(capsys, "info", out)
        lines.append([line for line in text.splitlines() if line.startswith("kernel")][-1])
    assert lines[0].split() == lines[1].split()


def test_64_bit_weights_keep_their_bits(tmp_path, capsys):
    params = {"a": {"kernel": RNG.normal(size=(8, 4))}, "step": np.int64(2**40)}
    np.savez(tmp_path / "x.npz", **named_leaves(params))
    out = str(tmp_path / "y")
    before = jax.config.jax_enable_x64
    run(capsys, "pack", str(tmp_path / "x.npz"), "--pattern", "2:4", "--prune", "--out", out)
    assert jax.config.jax_enable_x64 == before
    with jax.enable_x64(True):
        loaded = nmjax.unpack(nmjax.load_packed(out))
        assert loaded["a"]["kernel"].dtype == jnp.float64
        kept = np.asarray(loaded["a"]["kernel"])
        np.testing.assert_array_equal(kept, np.where(kept != 0, params["a"]["kernel"], 0))
        assert (kept != 0).sum() == 16
        assert loaded["step"] == 2**40


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "nothing"),
        ("plan", "nothing", "--pattern", "2:4"),
        ("plan", "DENSE", "--pattern", "4:2"),
        ("plan", "DENSE", "--pattern", "2:4", "--exclude", "typo"),
        ("plan", "DENSE", "--pattern", "2:4", "--subtree", "params"),
        ("pack", "DENSE", "--pattern", "2:4", "--prune", "--exclude", "stem", "--out", "no/where"),
    ],
)
def test_errors_are_one_message(files, capsys, arguments):
    _, err = run(capsys, *(files[0] if a == "DENSE" else a for a in arguments))
    assert err.startswith("error: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "info | plan | prune | pack | bench"),
        ("unpack", "unpack"),
        ("pack x --pattern 2:4", "--out"),
        ("plan x --pattern 2:4 --dense-if-indivisible", "--dense-if-indivisible"),
        ("bench x --batch 0", "'0' is not a positive integer"),
        ("bench x --side -1", "--side"),
        ("bench x --threads 1,two", "'two' is not a positive integer"),
        ("bench x --threads 1,2,1", "'1,2,1' has a number twice"),
        ("bench x --batch １", "'１' is not a positive integer"),
        ("prune x --pattern 2:4", "--out"),
    ],
)
def test_unknown_commands_exit_with_usage(capsys, arguments, words):
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2
    usage, said = capsys.readouterr().err.rsplit("error: ", 1)
    assert usage.startswith("usage: nmjax")
    assert words in said


def test_as_a_program(files):
    command = [sys.executable, "-m", "nmjax", "info", files[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "body/kernel" in done.stdout
    done = subprocess.run([*command[:-1], "nothing"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: " in done.stderr
