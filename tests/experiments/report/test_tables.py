"""The tables as text: what stands in which column, and what is marked."""

import pytest
from rich.console import Console

from experiments.report.numbers import Run
from experiments.report.tables import baselines, block_table, main_table, print_table, sweep_table


def test_cells_of_the_main_table(run):
    table = main_table(run)
    assert table.header == (
        "method",
        "accuracy %",
        "loss",
        "SAD %",
        "flips ‰",
        "kept %",
        "time",
    )
    row, line = run.rows[2], table.groups["2:4"][2]
    metric, loss = row.numbers["metric"], row.numbers["loss"]
    assert line.cells == (
        "STE",
        f"{100 * metric.mean:.2f} ± {100 * metric.error:.2f}",
        f"{loss.mean:.3f} ± {loss.error:.3f}",
        f"{100 * row.numbers['sad'].mean:.1f} ± {100 * row.numbers['sad'].error:.1f}",
        f"{1e3 * row.numbers['flip_rate'].mean:.2f} ± {1e3 * row.numbers['flip_rate'].error:.2f}",
        "50",
        "1.25",
    )


def test_further_metrics_have_columns_without_errors(data):
    data["settings"]["metrics"].append({**data["settings"]["metrics"][0], "name": "top 5"})
    for entry in data["trials"]:
        entry["epochs"][-1]["test"]["top 5"] = [0.99] * 4
    table = main_table(Run(data))
    assert table.header[:3] == ("method", "accuracy %", "top 5 %")
    assert table.groups["2:4"][0].cells[2] == "99.00"


def test_the_best_sparse_method_is_marked(run):
    for lines in main_table(run).groups.values():
        assert [line.cells[0] for line in lines if line.is_best] == ["SR-STE"]


def test_blocks_stand_below_what_is_as_dense(run):
    table = block_table(run)
    names = {pattern: [line.cells[0] for line in lines] for pattern, lines in table.groups.items()}
    blocks = ["1xN", "SUBP, L1", "SUBP"]
    assert names["1x4@0.5"] == ["dense", "SR-STE 2:4", "SR-STE 1:2", *blocks]
    assert names["1x8@0.75"] == ["dense", *blocks]
    dense, one_shot = table.groups["1x8@0.75"][:2]
    assert table.header[4:] == ("balance %", "regrown", "in a row")
    assert one_shot.cells[4:] == ("83", "1.5", "1-3/8")
    assert dense.cells[4:] == ("", "", "")


def test_methods_that_remember_no_blocks_have_the_plain_columns_only(data):
    entry = next(t for t in data["trials"] if t["part"] == "blocks")
    epochs = [
        {k: v for k, v in e.items() if k not in ("regrown", "kept_rows")} for e in entry["epochs"]
    ]
    data["trials"].append({**entry, "method": "ste", "epochs": epochs})
    cells = block_table(Run(data)).groups[entry["pattern"]][-1].cells
    assert cells[0] == "STE"
    assert cells[4:] == ("", "", "")


def test_the_sweep_is_compared_with_ste(run, bits):
    table = sweep_table(run, decoupled=False)
    lines = table.groups["1:2"]
    assert [line.cells[0] for line in lines] == ["-0.002", "0", "0.0002", "0.02", "0.2"]
    # The learning rates add up to 40 * 0.05.
    assert [line.cells[1] for line in lines][2:] == ["0.0004", "0.04", "0.4"]
    assert table.header[-1] == "against STE"
    ste, refined = run.find("1:2", "ste"), run.find("1:2", "sr_ste")
    assert lines[1].cells[-1] == ""
    assert lines[3].cells[-1] == run.gap(refined, ste)
    assert sum(line.is_best for line in lines) == 1
    after = sweep_table(Run(bits), decoupled=True).groups["1:2"]
    assert [float(line.cells[0]) for line in after] == pytest.approx([0, 2e-3, 0.2, 2])


def test_without_blocks_there_is_no_table_of_them(data):
    data["trials"] = [t for t in data["trials"] if t["part"] != "blocks"]
    assert block_table(Run(data)).groups == {}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115,PTH123
    print_table(data, console)
    text = console.export_text()
    assert "SR-STE" in text
    assert "1xN" not in text


def test_baselines_are_shown_as_the_metric_is(run, bits):
    assert baselines(run) == "chance 10.00 (accuracy %)"
    assert baselines(Run(bits)) == "chance 0.100 (bits per byte)"
    run.settings["baselines"] = {}
    assert baselines(run) == ""
