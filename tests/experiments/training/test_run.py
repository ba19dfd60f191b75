"""`python -m experiments.train`: what it leaves on disk, and that resuming changes nothing."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tyro

from experiments.checkpointing.checkpoints import Checkpoints
from experiments.json_files import JsonLines
from experiments.tasks.task import Metric
from experiments.train import main
from experiments.training.flags import Flags
from experiments.training.run import Run, _score
from nmjax.files.checkpoints import read_checkpoint, read_params
from nmjax.trees.leaves import named_leaves
from tests.experiments.prepared import cifar10_examples, prepare

# Half of its epochs dense, half pruned: the state of this method matters most.
DIGITS = ["--method", "one_shot", "--epochs", "4", "--batch-size", "40", "--log-every", "0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four epochs, never interrupted."""
    runs = tmp_path_factory.mktemp("runs")
    assert main([*DIGITS, "--runs-dir", str(runs), "--name", "whole"]) == 0
    return runs / "whole"


def metrics(folder):
    return [{**line, "seconds": 0} for line in JsonLines(folder / "metrics.jsonl").read()]


def stored(folder, steps):
    """The arrays of a checkpoint, as orbax reads them without being told what to expect."""
    tree = read_checkpoint(folder / "checkpoints" / str(steps) / "state")
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_the_params_of_a_checkpoint(whole):
    params, where = read_params(whole / "checkpoints" / "80" / "state")
    assert where == "state/train/params"
    assert not {"opt_state", "sparse"} & set("/".join(named_leaves(params)).split("/"))


def test_what_a_run_leaves(whole):
    lines = JsonLines(whole / "metrics.jsonl").read()
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines] == [20, 40, 60, 80]
    assert {len(line["train_loss"]) for line in lines} == {1}
    assert lines[-1]["test"]["accuracy"][0] > 0.3
    assert lines[-1]["density"] == [0.5]
    assert set(lines[0]["sad_first"]) >= {"block1/conv1/kernel"}
    settings = json.loads((whole / "settings.json").read_text())
    assert settings["flags"]["method"] == "one_shot"
    assert settings["recipe"]["epochs"] == 4
    assert settings["machine"]["jax"] == jax.__version__
    assert "block1/conv1/kernel" in (whole / "plan.txt").read_text()
    steps = {path.name for path in (whole / "checkpoints").iterdir()}
    assert {"60", "80"} <= steps
    assert len(steps) <= 3  # the last two and the best


@pytest.mark.parametrize("stop_in_epoch", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_uninterrupted_one(whole, monkeypatch, capsys, stop_in_epoch):
    name = f"stopped{stop_in_epoch}"
    flags = [*DIGITS, "--runs-dir", str(whole.parent), "--name", name]
    folder = whole.parent / name
    append = JsonLines.append

    def stop(self, line):
        append(self, line)
        if line["epoch"] == stop_in_epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "append", stop)
        assert main(flags) == 130
    assert f"--resume continues from epoch {stop_in_epoch - 1}\n" in capsys.readouterr().out
    # The interrupted epoch has a line and no checkpoint, and is trained again.
    assert len(metrics(folder)) == stop_in_epoch
    assert main([*flags, "--resume"]) == 0
    assert metrics(folder) == metrics(whole)
    ours, theirs = stored(folder, 80), stored(whole, 80)
    assert ours.keys() == theirs.keys()
    assert any("trace" in path for path in ours)
    assert any("batch_stats" in path for path in ours)
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, err_msg=path)


def test_resuming_a_complete_run_does_nothing(whole, capsys):
    before = metrics(whole)
    assert main([*DIGITS, "--runs-dir", str(whole.parent), "--name", "whole", "--resume"]) == 0
    assert "4 of 4 epochs done" in capsys.readouterr().out
    assert metrics(whole) == before


def test_damaged_lines_and_scores_do_not_stop_a_run(whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "whole")
    before = metrics(folder)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"epoch": 2', '{"epoch: 2'))
    damaged = path.read_bytes()
    (folder / "checkpoints" / "80" / "metrics" / "metrics").write_text("{")
    assert main([*DIGITS, "--runs-dir", str(tmp_path), "--name", "whole", "--resume"]) == 0
    said = capsys.readouterr()
    assert "4 of 4 epochs done" in said.out
    assert f"the score of the checkpoint {folder}/checkpoints/80 is damaged" in said.err
    assert f"warning: {path} is damaged in line 2; it is now damaged-metrics.jsonl" in said.err
    assert metrics(folder) == [line for line in before if line["epoch"] != 2]
    assert (folder / "damaged-metrics.jsonl").read_bytes() == damaged


def test_a_run_is_not_overwritten_nor_resumed_as_another(whole, capsys):
    flags = [*DIGITS, "--runs-dir", str(whole.parent), "--name", "whole"]
    assert main(flags) == 1
    assert "already holds a run: give --resume to continue it, or another --name" in (
        capsys.readouterr().err
    )
    assert main([*flags, "--resume", "--seeds", "1", "--learning-rate", "0.2"]) == 1
    error = capsys.readouterr().err
    assert "with other settings: learning_rate is 0.2, not 0.1; seeds is [1], not [0]." in error
    # The recipe decides, not who said it.
    assert main([*flags, "--resume", "--learning-rate", "0.1", "--log-every", "7"]) == 0


def test_a_run_that_cannot_be_opened_gives_the_folder_back(tmp_path, monkeypatch):
    flags = Flags(runs_dir=tmp_path, name="run", epochs=1, resume=True)

    def damaged(self, like):
        raise ValueError("no checkpoint is whole")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "restore", damaged)
        # The error is kept, as notebooks do, and with it whatever `Run` held.
        with pytest.raises(ValueError, match="no checkpoint is whole") as kept:
            Run(flags)
    run = Run(flags)
    run.checkpoints.close()
    run.release()
    assert kept.value is not None


@pytest.mark.slow
def test_several_devices_and_seeds_compute_the_same(whole):
    flags = [*DIGITS, "--runs-dir", str(whole.parent), "--name", "mesh"]
    flags += ["--devices", "4", "--seeds", "0", "3"]
    run = Run(tyro.cli(Flags, args=flags))
    run.release()
    leaf = run.state.train.params["stem"]["kernel"]
    assert leaf.shape[0] == 2
    assert len(leaf.sharding.device_set) == 4
    assert leaf.sharding.is_fully_replicated
    assert main([*flags, "--resume"]) == 0
    for ours, theirs in zip(metrics(whole.parent / "mesh"), metrics(whole), strict=True):
        assert len(ours["test"]["loss"]) == len(ours["sad_epoch"]) == 2
        assert ours["train_loss"][0] == pytest.approx(theirs["train_loss"][0], rel=0.02)
        assert ours["train_loss"][1] != ours["train_loss"][0]
        assert ours["density"] == theirs["density"] * 2


@pytest.mark.slow
def test_blocks_are_in_the_lines_of_a_run_that_was_stopped_and_resumed(tmp_path, monkeypatch):
    flags = ["--method", "subp", "--pattern", "1x4@0.5", "--epochs", "5", "--batch-size", "40"]
    flags += ["--log-every", "0", "--runs-dir", str(tmp_path), "--name"]
    assert main([*flags, "whole"]) == 0
    save = Checkpoints.save

    def stop(self, steps, state, **score):
        save(self, steps, state, **score)
        if steps == 40:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        assert main([*flags, "stopped"]) == 130
    assert main([*flags, "stopped", "--resume"]) == 0
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    blocks = [line["blocks"] for line in metrics(tmp_path / "whole")]
    assert blocks[-1]["kept_rows"]["block3/conv2/kernel"] == [[16] * 8]
    # With five epochs the ramp ends with the second; some blocks go, none come back.
    assert [entry["regrown"] for entry in blocks] == [[0]] * 5
    assert blocks[0]["sad"] == [0] != blocks[1]["sad"]


@pytest.mark.slow
def test_cifar10_from_disk(tmp_path, capsys):
    train, test = cifar10_examples(70), cifar10_examples(23, seed=1)
    prepare("cifar10", tmp_path, {"train": train, "test": test})
    flags = ["--task", "cifar10", "--model", "resnet8", "--pattern", "1:4", "--epochs", "3"]
    flags += ["--batch-size", "16", "--learning-rate", "0.05", "--warmup-epochs", "0"]
    flags += ["--data-dir", str(tmp_path), "--runs-dir", str(tmp_path), "--log-every", "3"]
    assert main(flags) == 0
    lines = metrics(tmp_path / "cifar10-resnet8-sr_ste-1_4")
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert lines[-1]["train_loss"][0] < lines[0]["train_loss"][0]
    assert lines[-1]["density"] == [0.25]
    printed = capsys.readouterr().out
    assert "lambda_w 0.0002: 1:4 keeps" in printed
    assert re.search(r"epoch 1, step 3/4: loss \d\.\d{4}, [\d,]+ examples/s", printed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "imagenet2012"], "tfds build imagenet2012 --file_format=array_record"),
        (["--task", "mnist"], "no task named 'mnist'; choose from cifar10, coco"),
        (["--pattern", "2-4"], "2-4"),
        (["--pattern", "2:5"], "kernel"),
        (["--method", "magic"], "no method named 'magic'; choose from dense"),
        (["--method", "ste", "--lambda-w", "1"], "'ste' has no sparse-refined term"),
        (["--model", "resnet18"], "no model named 'resnet18'; choose from small_resnet"),
        (["--devices", "2"], "a batch of 25 does not split evenly over 2 devices"),
        (["--devices", "99"], "devices must be from 1 to 8, got 99"),
        (["--mesh", "data=3"], "has 3 devices, which does not divide the 8 present"),
        (["--mesh", "data=5,model=2"], "has 10 devices, which does not divide"),
        (["--layout", "fsdp"], "give a --mesh"),
        (["--mesh", "z=8", "--batch-size", "40", "--shard", "1/kernel=z,*"], "cuts groups of 4"),
        (["--mesh", "z=8", "--batch-size", "40", "--shard", "nothing=z"], "match no leaf"),
        (["--accumulate", "2"], "a batch of 25 does not split evenly into 2 parts"),
        (["--batch-size", "801"], "batch_size must be from 1 to 800 examples, got 801"),
        (["--processes", "2"], "need --coordinator, --processes and --process together"),
        (["--keep-dense", "nothing"], "nothing"),
        (["--method", "subp"], "'subp' prunes blocks and cannot take 2:4"),
        (["--method", "subp", "--pattern", "1x4@0.5/layer"], "uniform"),
        (["--pattern", "1x5@0.5"], "16 outputs are not a multiple of 5"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, capsys, flags, message):
    folder = ["--runs-dir", str(tmp_path), "--data-dir", str(tmp_path)]
    assert main([*flags, *folder]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--batch-size", "-5"], "batch_size must be at least 1, got -5"),
        (["--ramp", "0.5", "0.1"], "ramp must be two rising fractions of the epochs"),
        (["--ramp", "nan", "1"], "ramp must be two rising fractions of the epochs"),
        (["--seeds", "1", "1"], "seeds must be distinct"),
        (["--seeds", "-1"], "seeds must be distinct integers from 0"),
        (["--seeds", "2147483648"], "seeds must be distinct integers from 0"),
        (["--learning-rate", "0"], "learning_rate must be above 0, got 0"),
        (["--learning-rate", "nan"], "learning_rate must be above 0, got nan"),
        (["--learning-rate", "inf"], "learning_rate must be above 0, got inf"),
        (["--momentum", "1"], "momentum must be from 0 to below 1, got 1"),
        (["--momentum", "-0.1"], "momentum must be from 0 to below 1, got -0.1"),
        (["--second-momentum", "nan"], "second_momentum must be from 0 to below 1, got nan"),
        (["--label-smoothing", "1"], "label_smoothing must be from 0 to below 1, got 1"),
        (["--clip", "-1"], "clip must be at least 0, got -1"),
        (["--weight-decay", "nan"], "weight_decay must be at least 0, got nan"),
        (["--warmup-epochs", "-1"], "warmup_epochs must be at least 0, got -1"),
        (["--lambda-w", "nan"], "lambda_w must be a finite number, got nan"),
        (["--lambda-decoupled", "inf"], "lambda_decoupled must be a finite number, got inf"),
        (["--name", ".."], "name must be a folder within runs, got '..'"),
        (["--name", "a/../../b"], "name must be a folder within runs"),
        (["--name", "."], "name must be a folder within runs"),
        (["--name", "/tmp/run"], "name must be a folder within runs"),
        (["--lamda-w", "1"], "--lambda-w"),
    ],
)
def test_flags_that_do_not_parse(capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        main(flags)
    assert error.value.code == 2
    # tyro breaks lines and draws a box around them.
    assert message in " ".join(re.sub("│", "", capsys.readouterr().err).split())


def test_numbers_at_the_edge_of_what_makes_sense_are_taken():
    flags = Flags(name="deep/er", seeds=(2**31 - 1,), momentum=0.0, clip=0.0, lambda_w=-0.1)
    assert flags.folder.as_posix() == "runs/deep/er"
    assert (flags.seeds, flags.lambda_w) == ((2**31 - 1,), -0.1)


def test_help_explains_every_flag():
    command = [sys.executable, "-m", "experiments.train", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = re.sub(r"[\s│]+", " ", text)
    for name in Flags.__dataclass_fields__:
        # After the flag and its type, words.
        assert re.search(rf"--{name.replace('_', '-')}\b[^()]*? [a-z]{{2,}}", text, re.I), name
    assert text.count("(default: ") == len(Flags.__dataclass_fields__)


def test_the_best_checkpoint_is_that_of_the_first_metric():
    def score(metric, **test):
        task = SimpleNamespace(metrics=(metric, Metric("other")))
        return _score(task, SimpleNamespace(test={name: np.array(v) for name, v in test.items()}))

    error = Metric("error", perfect=0.0)
    assert score(Metric(), accuracy=[0.5, 0.75], loss=[1.0, 2.0]) == 0.625
    assert score(error, error=[2.0]) > score(error, error=[3.0])
    assert score(error, error=[3.0]) > score(error) == score(error, error=[np.nan])
