"""The command line on checkpoints as they come: PyTorch's, experts, and training states."""

import re

import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import nmjax
from nmjax.__main__ import main
from nmjax.files.checkpoints import read_checkpoint
from nmjax.files.tensor_files import write_tensors
from nmjax.trees.leaves import named_leaves

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == (1 if err else 0), err
    return out, err


def kept(path, name, axis):
    """The number of weights that each group of four along an axis keeps."""
    weight = np.asarray(named_leaves(nmjax.unpack(nmjax.load_packed(path)))[name])
    moved = np.moveaxis(weight, axis, -1)
    return (moved.reshape(*moved.shape[:-1], -1, 4) != 0).sum(-1)


def row(table, name):
    (line,) = (line for line in table.split("\n\n")[0].splitlines() if line.split()[0] == name)
    return line


def test_an_npz_of_torch(tmp_path, capsys):
    state = {
        "conv1.weight": normal(16, 8, 3, 3),
        "fc.weight": normal(12, 16),
        "fc.bias": normal(12),
    }
    np.savez(tmp_path / "net.npz", **state)
    out = tmp_path / "packed"
    command = ("pack", tmp_path / "net.npz", "--pattern", "2:4", "--prune", "--out", out)
    run(capsys, *command)
    assert (kept(out, "conv1/weight", -3) == 2).all()
    assert (kept(out, "fc/weight", -1) == 2).all()


def test_convolutions_of_torch(tmp_path, capsys):
    state = {}
    for name, taps in (("a", (3,)), ("conv_b", (3,)), ("c", (3, 3)), ("d", (3, 2, 1))):
        state |= {f"{name}.weight": normal(12, 8, *taps), f"{name}.bias": normal(12)}
    write_tensors(tmp_path / "x", state, {"format": "pt"})
    command = ("plan", tmp_path / "x", "--pattern", "2:4")
    table, _ = run(capsys, *command)
    for name, axis in (("conv_b", "-2"), ("c", "-3"), ("d", "-4")):
        assert row(table, f"{name}/weight").split()[2:4] == ["2:4", axis]
    # A bilinear layer (out, in, in) looks alike.
    assert "unknown axes" in row(table, "a/weight")
    table, _ = run(capsys, *command, "--axes", "^a/weight=-2")
    assert row(table, "a/weight").split()[2:4] == ["2:4", "-2"]


EXPERTS = {
    "layers.0.experts.gate_up_proj": normal(8, 32, 64),
    "layers.0.experts.down_proj": normal(8, 32, 32),
    "layers.0.q_proj.weight": normal(32, 32),
}


def test_experts_are_not_left_dense_silently(tmp_path, capsys):
    write_tensors(tmp_path / "x", EXPERTS, {"format": "pt"})
    out = tmp_path / "packed"
    command = ("pack", tmp_path / "x", "--pattern", "2:4", "--prune", "--out", out)
    _, err = run(capsys, *command)
    assert "unknown axes" in err
    assert "layers/0/experts/gate_up_proj (8, 32, 64)" in err
    assert "layers/0/experts/down_proj (8, 32, 32)" in err
    assert "q_proj" not in err
    assert "give their reduction axes in --axes 'RULE=AXES'" in err
    assert {"--axes", "--exclude", "--on-unknown"} <= set(re.findall("--[a-z-]+", err))
    assert not re.search("[a-z_]+=", err.replace("--axes 'REGEX=-2'", ""))
    run(capsys, *command, "--axes", "experts=-2")
    assert (kept(out, "layers/0/experts/gate_up_proj", -2) == 2).all()
    text, _ = run(capsys, *command, "--on-unknown", "dense")
    assert "unknown axes" in text
    assert "--axes" in text


def test_the_plan_of_experts_says_how_much_is_unknown(tmp_path, capsys):
    write_tensors(tmp_path / "x", EXPERTS, {"format": "pt"})
    command = ("plan", tmp_path / "x", "--pattern", "2:4")
    text, _ = run(capsys, *command)
    assert "unknown axes" in row(text, "layers/0/experts/down_proj")
    assert "24,576 of 25,600" in text  # Weights with unknown axes.
    assert text.count("WARNING") == 1
    assert "--axes" in text
    _, err = run(capsys, *command, "--on-unknown", "error")
    assert "unknown axes" in err


def test_nothing_but_experts(tmp_path, capsys):
    write_tensors(tmp_path / "x", {"experts/w1": normal(8, 32, 64)}, {})
    _, err = run(capsys, "plan", tmp_path / "x", "--pattern", "2:4")
    assert "no leaf becomes sparse" in err
    assert err.endswith("Pass --axes 'RULE=AXES'.\n")


def test_a_few_unknown_weights_are_reported(tmp_path, capsys):
    """The library's own warning is for plans that are mostly unknown."""
    params = {"experts/w1": normal(2, 4, 4), "head/kernel": normal(32, 64)}
    write_tensors(tmp_path / "x", params, {})
    text, _ = run(capsys, "plan", tmp_path / "x", "--pattern", "2:4")
    assert "WARNING: 32 of 2,080 parameters (2%) stay dense" in text
    assert text.count("WARNING") == 1
    assert "--axes 'RULE=AXES' for experts/w1" in text


def test_optimizer_moments_are_not_planned(tmp_path, capsys):
    params = {"Dense_0": {"kernel": normal(16, 16), "bias": normal(16)}}
    state = {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": np.int32(3)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", state)
    text, _ = run(capsys, "plan", tmp_path / "x", "--pattern", "2:4")
    assert text.startswith("Only params is read")
    assert "opt_state" not in text
    plan = nmjax.make_plan(read_checkpoint(tmp_path / "x"), "2:4")
    assert list(plan) == ["params/Dense_0/kernel"]


@pytest.mark.parametrize("command", ["plan", "pack"])
def test_help_names_the_options(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "--axes RULE=AXES" in text
    assert "--on-unknown" in text
