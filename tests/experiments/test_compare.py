"""The comparison end to end: files, resuming, Ctrl-C, a trial that diverges."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tyro
from rich.console import Console

from experiments import compare as module
from experiments.checkpointing.run_folder import take
from experiments.compare import Comparison, Flags, compare, main
from experiments.report.numbers import Run
from experiments.report.tables import block_table, main_table
from experiments.tasks.task import Compared
from experiments.training.finding import task_names
from experiments.training.flags import Flags as TrainFlags
from tests.experiments.tiny import tiny_task

METHODS = ("dense", "one_shot", "ste", "sr_ste", "sr_ste_negative")
BLOCK_METHODS = ("one_by_n", "subp_l1", "subp")
SECTIONS = ("summary", "run", "table", "paper", "sad", "strength", "machine")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(module, "make_task", lambda flags: tiny_task(epochs=flags.epochs or 2))
    monkeypatch.setattr(module, "TIMED_STEPS", 2)


def flags(folder, **given):
    settings = {"patterns": ("2:4", "1:8"), "seeds": (0, 1), "runs_dir": folder}
    settings |= {"methods": METHODS, "block_methods": BLOCK_METHODS, "sweep": (10.0, 100.0)}
    return Flags(**{**settings, **given})


def run(flags):
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115,PTH123
    status = compare(flags, console)
    return status, console.export_text(), json.loads((flags.folder / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_task", lambda flags: tiny_task(epochs=flags.epochs or 2))
        patch.setattr(module, "TIMED_STEPS", 2)
        given = flags(tmp_path_factory.mktemp("runs"), block_patterns=("1x4@0.75",))
        return given, *run(given)


def test_every_trial_is_there(whole):
    given, status, _, data = whole
    assert status == 0
    titles = [(t["part"], t["pattern"], t["method"]) for t in data["trials"]]
    expected = [("main", p, m) for p in given.patterns for m in given.methods]
    expected += [("sweep", "1:8", "sr_ste")] * 3 + [("beside", "1:4", "sr_ste")]
    expected += [("blocks", p, m) for p in given.block_patterns for m in given.block_methods]
    assert titles == expected
    assert all(len(t["epochs"]) == 2 and not t["error"] for t in data["trials"])


def test_it_ends_with_commands_that_exist(whole):
    given, _, said, _ = whole
    folder = re.escape(str(given.folder))
    assert re.search(rf"report: python -m webbrowser file://\S*{folder}/report.html\n", said)
    assert f"methods: python -m experiments.ladder {given.folder}\n" in said
    command = re.search(r"pack it: python -m experiments.train (.*)\n", said).group(1)
    trained = tyro.cli(TrainFlags, args=command.split())
    assert (trained.method, trained.pattern) == ("sr_ste", "2:4")
    assert trained.packed.parent == given.folder


def test_help_lists_the_tasks(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert f"Tasks: {', '.join(task_names())}." in shown
    assert {"digits", "python_bytes"} <= set(task_names())


def test_the_strengths_are_those_of_the_flags_and_the_papers(whole):
    data = whole[-1]
    swept = [t["lambda_w"] for t in data["trials"] if t["part"] == "sweep"]
    assert swept == pytest.approx([2e-4, 0.1, 1.0])


def test_the_page_needs_nothing_else_and_has_all_sections(whole):
    given = whole[0]
    page = (given.folder / "report.html").read_text()
    for section in SECTIONS:
        assert f'<section id="{section}">' in page
    assert "<img" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "<link" not in page
    assert "<script" not in page
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower().split()


def test_the_table_on_the_console_is_that_of_the_file(whole):
    _, _, text, data = whole
    for lines in main_table(Run(data)).groups.values():
        for line in lines:
            assert all(cell.replace(" ± ", "±") in text for cell in line.cells)


def test_sparse_methods_keep_what_the_pattern_says(whole):
    data = whole[-1]
    for row in Run(data).part("main", "blocks"):
        expected = 1.0 if row.method == "dense" else data["settings"]["density"][row.pattern]
        assert row.numbers["density"].mean == pytest.approx(expected)


def test_dense_is_the_same_whatever_pattern_watches_it(whole):
    data = whole[-1]
    dense = [t for t in data["trials"] if t["method"] == "dense"]
    assert dense[0]["epochs"][-1]["test"] == dense[1]["epochs"][-1]["test"]


def test_blocks_are_in_the_table_and_on_the_page(whole):
    given, _, text, data = whole
    page = (given.folder / "report.html").read_text()
    assert '<section id="blocks">' in page
    for lines in block_table(Run(data)).groups.values():
        assert [line.cells[0] for line in lines][:2] == ["dense", "SR-STE 1:4"]
        for cell in [cell for line in lines for cell in line.cells]:
            assert f"{cell}</td>" in page or f"{cell}</th>" in page
            assert cell.replace(" ± ", "±") in text
    films = data["films"]
    assert set(films) == {f"{p} {m}" for p in given.block_patterns for m in given.block_methods}
    for name, film in films.items():
        assert [moment["epoch"] for moment in film] == [1, 2]
        kept = [row.count("1") for row in film[-1]["rows"]]
        assert {len(row) for row in film[-1]["rows"]} == {16}
        assert sum(kept) == 16
        entry = next(t for t in data["trials"] if name == f"{t['pattern']} {t['method']}")
        assert entry["epochs"][-1]["kept_rows"][film[-1]["layer"]][0] == kept


def test_step_times_are_relative_to_dense(whole):
    times = whole[-1]["step_times"]
    assert len(times) == 10
    assert all(t["ratio"] == 1 for t in times if t["method"] == "dense")
    assert all(t["milliseconds"] > 0 for t in times)


def test_the_same_comparison_twice_gives_the_same_numbers(whole, tmp_path):
    again = run(flags(tmp_path, methods=("dense", "sr_ste"), patterns=("1:8",), sweep=()))[-1]
    for trial in again["trials"]:
        twin = next(
            t
            for t in whole[-1]["trials"]
            if (t["pattern"], t["method"], t["lambda_w"])
            == (trial["pattern"], trial["method"], trial["lambda_w"])
        )
        assert twin["epochs"] == trial["epochs"]


def test_ctrl_c_leaves_a_report_and_resume_does_the_rest(tmp_path, monkeypatch):
    given = flags(tmp_path, methods=("dense", "ste", "sr_ste"), patterns=("1:8",), sweep=())
    run_one, trained = Comparison.run, []

    def interrupted(self, trial, results, on_step):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(trial)
        run_one(self, trial, results, on_step)

    monkeypatch.setattr(Comparison, "run", interrupted)
    status, text, data = run(given)
    assert status == 130
    assert "2 of 3 trials are in the report" in text
    page = (given.folder / "report.html").read_text()
    assert "STE" in page
    assert "SR-STE, " not in page
    monkeypatch.setattr(Comparison, "run", run_one)
    status, _, after = run(flags(tmp_path, **{**vars(given), "resume": True}))
    assert status == 0
    assert after["trials"][:2] == data["trials"]
    assert len(after["trials"]) == 3


def test_resuming_with_other_settings_is_refused(tmp_path, capsys):
    given = {"methods": ("ste",), "patterns": ("2:4",)}
    run(flags(tmp_path, **given))
    arguments = ["--runs-dir", str(tmp_path), "--methods", "ste", "--patterns", "2:4", "--resume"]
    assert main([*arguments, "--epochs", "3", "--seeds", "0", "1", "--sweep", "10", "100"]) == 1
    assert (
        "cannot be resumed with other settings: recipe epochs is 3, not 2"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("killed", [True, False])
def test_results_of_other_settings_are_not_resumed(tmp_path, capsys, killed):
    given = {"methods": ("ste",), "patterns": ("2:4",), "sweep": ()}
    run(flags(tmp_path, **given))
    other = flags(tmp_path, **given, epochs=3)
    settings = other.folder / "settings.json"
    settings.unlink()
    if killed:  # After the folder was taken, and before there were results.
        text = json.dumps(Comparison(other).settings(), default=str)
        settings.write_text(text)
    arguments = ["--runs-dir", str(tmp_path), "--methods", "ste", "--patterns", "2:4", "--resume"]
    assert main([*arguments, "--epochs", "3", "--seeds", "0", "1"]) == 1
    assert "results.json was made with other settings: recipe epochs is 3, not 2" in (
        capsys.readouterr().err
    )


def test_a_folder_is_compared_in_once_and_started_over(tmp_path, capsys):
    given = {"methods": ("ste",), "patterns": ("2:4",), "sweep": ()}
    first = run(flags(tmp_path, **given))[-1]
    lock = take(flags(tmp_path).folder)
    assert main(["--runs-dir", str(tmp_path), "--methods", "ste", "--patterns", "2:4"]) == 1
    assert "is in use by process" in capsys.readouterr().err
    lock.close()
    again = run(flags(tmp_path, **given, epochs=3))[-1]
    assert [len(trial["epochs"]) for trial in again["trials"]] == [3]
    assert [len(trial["epochs"]) for trial in first["trials"]] == [2]
    settings = json.loads((flags(tmp_path).folder / "settings.json").read_text())
    assert settings["recipe"]["epochs"] == 3


def test_a_training_run_is_never_replaced(tmp_path, capsys):
    folder = flags(tmp_path).folder
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text('{"flags": "those of experiments.train"}')
    for argument in ([], ["--resume"]):
        assert main(["--runs-dir", str(tmp_path), *argument]) == 1
        assert str(folder) in capsys.readouterr().err
        assert "experiments.train" in (folder / "settings.json").read_text()


def test_a_trial_that_diverges_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "make_task", lambda flags: tiny_task(epochs=2, lambda_w=1e30))
    given = flags(tmp_path, methods=("dense", "sr_ste"), patterns=("1:8",), sweep=())
    status, text, data = run(given)
    assert status == 0
    diverged = {t["method"]: t["error"] for t in data["trials"] if t["lambda_w"] > 1}
    assert "not finite" in diverged["sr_ste"]
    assert "not finite" in re.sub(r"\s+", " ", text)
    assert "not finite" in (given.folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": ()}, "seeds must be distinct"),
        ({"seeds": (2**31,)}, "seeds must be distinct integers from 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"lambda_w": float("nan")}, "lambda_w must be a finite number, got nan"),
        ({"sweep": (10.0, float("inf"))}, "sweep must be finite numbers"),
        ({"patterns": ()}, "patterns must name at least one pattern"),
        ({"name": ".."}, "name must be a folder within"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        Comparison(flags(tmp_path, **given))


def test_unknown_methods_and_patterns_are_errors(tmp_path, capsys):
    assert main(["--methods", "magic", "--runs-dir", str(tmp_path)]) == 1
    assert "no method named 'magic'" in capsys.readouterr().err
    assert main(["--methods", "subp", "--runs-dir", str(tmp_path)]) == 1
    assert "cannot take 2:4" in capsys.readouterr().err
    assert main(["--patterns", "4:2", "--runs-dir", str(tmp_path)]) == 1
    assert "1 <= n <= m" in capsys.readouterr().err


def test_the_task_says_what_is_compared_and_flags_change_it(tmp_path, monkeypatch):
    chosen = Compared(patterns=("1:4",), methods=("dense", "ste"), seeds=(5, 6))
    task = dataclasses.replace(tiny_task(epochs=2), compared=chosen)
    monkeypatch.setattr(module, "make_task", lambda flags: task)
    assert Comparison(Flags(runs_dir=tmp_path)).compared == chosen
    given = Flags(runs_dir=tmp_path, seeds=(1,), methods=("sr_ste", "sr_ste_decoupled"), sweep=(2,))
    assert Comparison(given).compared.patterns == ("1:4",)
    trials = [(t.method, t.lambda_w, t.seeds) for t in Comparison(given).trials]
    assert trials == [
        ("sr_ste", 0.01, (1,)),
        ("sr_ste_decoupled", 0.5, (1,)),
        ("sr_ste", 2e-4, (1,)),
        ("sr_ste", 0.02, (1,)),
        ("sr_ste_decoupled", 1.0, (1,)),
    ]


def test_notes_are_printed_and_what_networks_do_is_kept(tmp_path, monkeypatch):
    def show(params, collections):
        return [{"given": "x", "network": str(params["head"]["bias"][0])}]

    task = dataclasses.replace(
        tiny_task(epochs=2),
        show=show,
        notes=("Four blobs.",),
        baselines=(("guessing", 0.25),),
    )
    monkeypatch.setattr(module, "make_task", lambda flags: task)
    given = flags(tmp_path, methods=("dense", "ste"), patterns=("1:8",), sweep=(), seeds=(0, 1))
    _, text, data = run(given)
    assert "Four blobs." in text
    assert "without learning: guessing 25.00 (accuracy %)" in " ".join(text.split())
    assert set(data["shown"]) == {"1:8 dense", "1:8 ste"}
    assert data["shown"]["1:8 dense"] != data["shown"]["1:8 ste"]
    page = (given.folder / "report.html").read_text()
    assert data["shown"]["1:8 ste"][0]["network"] in page


def test_a_missing_data_set_is_an_error_with_the_way_out(tmp_path, monkeypatch, capsys):
    from experiments.training.flags import make_task

    monkeypatch.setattr(module, "make_task", make_task)
    assert main(["--task", "wmt14", "--data-dir", str(tmp_path)]) == 1
    assert "tfds build wmt14_translate/de-en" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "metric", "beats"),
    [("python_bytes", "bits per byte", 4.0), ("number_names", "exact match", 0.3)],
)
def test_tasks_of_text_end_to_end(tmp_path, monkeypatch, task, metric, beats):
    from experiments.training.flags import make_task

    monkeypatch.setattr(module, "make_task", make_task)
    given = Flags(task=task, runs_dir=tmp_path, epochs=2, seeds=(0, 1), methods=("dense", "sr_ste"))
    status, text, data = run(given)
    assert status == 0
    assert task in text
    sign = Run(data).metric.sign
    for trial in data["trials"]:
        reached = np.mean(trial["epochs"][-1]["test"][metric])
        assert sign * reached > sign * beats
    assert len(data["shown"]) == 2
    assert all(data["shown"].values())
    page = (given.folder / "report.html").read_text()
    for section in (*SECTIONS, "shown"):
        assert f'<section id="{section}">' in page


@pytest.mark.slow
def test_the_digits_end_to_end(tmp_path, monkeypatch):
    from experiments.training.flags import make_task

    monkeypatch.setattr(module, "make_task", make_task)
    given = flags(
        tmp_path,
        methods=("sr_ste",),
        patterns=("1:16",),
        sweep=(),
        shapes="2:8/kernel",
        epochs=2,
    )
    status, text, data = run(given)
    assert status == 0
    assert "1:16" in text
    assert data["shapes"]["layer"] == "block1/conv2/kernel"
    taps = np.array(
        [[[int(t) for t in kernel] for kernel in row] for row in data["shapes"]["kernels"]]
    )
    # A group of 2:8 runs over a filter's inputs and taps: input channel first, then rows.
    groups = taps.transpose(1, 0, 2).reshape(16, -1, 8).sum(axis=2)
    assert (groups == 2).all()
    page = (given.folder / "report.html").read_text()
    for section in (*SECTIONS, "shapes"):
        assert f'<section id="{section}">' in page
