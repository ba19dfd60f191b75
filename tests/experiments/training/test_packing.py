"""What is trained is what ships: the packed file of a run, and the network that it serves."""

import os
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

import experiments.training.flags
import experiments.training.packing
import nmjax
from experiments.json_files import JsonLines
from experiments.train import main
from experiments.training.flags import Flags
from experiments.training.run import Run
from nmjax.linen import packed_apply
from nmjax.packed.weight import is_packed
from tests.experiments.tiny import Perceptron, tiny_task

METHODS = {
    "ste": "2:4",
    "sr_ste": "1:4",
    "one_shot": "2:4",
    "subp": "1x4@0.5",
    "one_by_n": "1x4@0.5",
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    def make(flags):
        # A high rate changes the ranking of weights after masks are chosen.
        return tiny_task(epochs=flags.epochs, learning_rate=0.3, ramp=flags.ramp or (0.0, 0.5))

    monkeypatch.setattr(experiments.training.flags, "find_task", lambda name: make)


def train_flags(folder, method, **given):
    given = {"epochs": 4, "log_every": 0, "name": method, "runs_dir": folder, **given}
    return Flags(method=method, pattern=METHODS.get(method, "2:4"), **given)


@pytest.mark.parametrize("method", METHODS)
def test_the_packed_network_is_the_one_that_was_evaluated(tmp_path, method):
    path = tmp_path / method / "network.safetensors"
    run = Run(train_flags(tmp_path, method, packed=path))
    assert run.finish() == 0
    served = nmjax.load_packed(path)
    assert is_packed(served["params"]["middle"]["kernel"])
    train = run.state.train
    evaluated = {"params": run.programs.forward(train), **train.collections}
    apply = jax.jit(packed_apply(Perceptron(16)), static_argnames="train")
    right = []
    for batch in run.job.task.eval_batches():
        logits = apply(served, batch["image"], train=False)
        expected = Perceptron(16).apply(evaluated, batch["image"], train=False)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
        right += [(np.argmax(logits, axis=1) == batch["label"])[batch["valid"] == 1]]
    line = JsonLines(tmp_path / method / "metrics.jsonl").read()[-1]
    assert np.concatenate(right).mean() == pytest.approx(line["test"]["accuracy"][0])


def test_weights_of_methods_that_remember_differ_from_the_largest(tmp_path):
    """Otherwise the test above would not notice masks chosen again from the weights."""
    run = Run(train_flags(tmp_path, "one_shot"))
    assert run.finish() == 0
    train, method = run.state.train, run.job.method
    kept = method.sparsifier.export(train.params, train.sparse)
    largest = nmjax.prune(train.params, method.plan)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), kept, largest)))


def test_a_finished_run_is_packed_by_the_command_that_it_prints(tmp_path, capsys):
    flags = ["--method", "sr_ste", "--epochs", "1", "--log-every", "0"]
    flags += ["--runs-dir", str(tmp_path / "all runs"), "--name", "run"]
    assert main(flags) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    said, _, command = line.partition(": ")
    assert said == "to pack the network"
    python, module, name, *words = shlex.split(command)
    assert (python, module, name) == ("python", "-m", "experiments.train")
    assert main(words) == 0
    out = capsys.readouterr().out
    path = tmp_path / "all runs" / "run" / "packed.safetensors"
    assert "1 of 1 epochs done" in out
    assert f"{path}: {path.stat().st_size:,} bytes" in out
    assert "to pack" not in out
    assert set(nmjax.load_packed(path)) == {"params", "batch_stats"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "dense"}, "--packed needs a method that trains sparse"),
        ({"seeds": (0, 1)}, "--packed writes one network: give one seed"),
        ({"packed": "network.bin"}, "--packed must be a .safetensors file, got .*network.bin"),
        ({"packed": "none/network.safetensors"}, "there is no folder .*none; create it first"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_training(tmp_path, given, message):
    packed = tmp_path / given.pop("packed", "network.safetensors")
    with pytest.raises(ValueError, match=message):
        Run(train_flags(tmp_path, given.pop("method", "ste"), packed=packed, **given))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_not_a_file_is_refused_before_training(tmp_path, make):
    path = tmp_path / "network.safetensors"
    make(path)
    with pytest.raises(OSError, match=r"network\.safetensors .*not a regular file"):
        Run(train_flags(tmp_path, "ste", packed=path))
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("parent", ["file", "file/below"])
def test_a_folder_that_is_a_file_is_refused_before_training(tmp_path, parent):
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, OSError), match=r"folder .*file"):
        Run(train_flags(tmp_path, "ste", packed=tmp_path / parent / "network.safetensors"))
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
    # Root may write anywhere, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "packed")
    (tmp_path / "packed").mkdir()
    with pytest.raises(PermissionError, match=r"packed cannot be written"):
        Run(train_flags(tmp_path, "ste", packed=tmp_path / "packed" / "network.safetensors"))
    assert [*tmp_path.iterdir()] == [tmp_path / "packed"]


def test_safetensors_is_needed_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.training.packing, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nmjax\[files\]'"):
        Run(train_flags(tmp_path, "ste", packed=tmp_path / "network.safetensors"))
    assert not list(tmp_path.iterdir())


def test_blocks_that_are_not_dropped_yet_are_an_error_and_the_run_is_kept(tmp_path, capsys):
    flags = ["--method", "subp", "--pattern", "1x4@0.5", "--epochs", "2", "--log-every", "0"]
    # The last masks are chosen before the ramp ends.
    flags += ["--ramp", "0", "1", "--runs-dir", str(tmp_path), "--name", "run"]
    assert main([*flags, "--packed", str(tmp_path / "network.safetensors")]) == 1
    assert "not sparse yet" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "10").is_dir()
    assert not (tmp_path / "network.safetensors").exists()
