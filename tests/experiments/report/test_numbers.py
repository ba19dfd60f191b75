"""The rows of a comparison equal what is recomputed by hand."""

import numpy as np
import pytest

from experiments.report.numbers import Number, Run, Summary, balance


def test_rows_are_means_and_errors_of_the_last_epoch(data):
    for row, entry in zip(Run(data).part("main"), data["trials"], strict=False):
        assert (row.pattern, row.method) == (entry["pattern"], entry["method"])
        last = entry["epochs"][-1]
        values = np.array(last["test"]["accuracy"])
        assert row.numbers["metric"].mean == pytest.approx(values.mean())
        assert row.numbers["metric"].error == pytest.approx(values.std(ddof=1) / 2)
        assert row.numbers["loss"].mean == pytest.approx(np.mean(last["test"]["loss"]))
        assert row.numbers["sad"].mean == pytest.approx(np.mean(last["sad_first"]) / 192)
        assert row.numbers["train_loss"].values == tuple(last["train_loss"])
        flips = [epoch["flip_rate"] for epoch in entry["epochs"]]
        assert row.numbers["flip_rate"].mean == pytest.approx(np.mean(flips))
        assert row.ratio == 1.25


def test_differences_are_paired():
    a, b = Summary((1.0, 2.0, 3.0)), Summary((0.9, 1.9, 2.9))
    assert a.minus(b).mean == pytest.approx(0.1)
    assert a.minus(b).error == pytest.approx(0, abs=1e-12)
    assert Summary((1.0,)).error == 0


def test_differences_as_text_are_rounded_to_their_error(run):
    assert run.shown["metric"].show_difference(Summary((0.01, 0.03))) == "+2.0 ± 1.0 points"
    assert run.shown["loss"].show_difference(Summary((-0.5, -0.5))) == "-0.50 ± 0.00"
    assert Number("kept %", 100, ".3g", has_error=False).show(Summary((0.0625, 0.0625))) == "6.25"
    assert Number("loss", 1, ".3f").show(Summary((0.5,))) == "0.500"


def test_curves_have_gaps_where_nothing_was_evaluated(run):
    row = run.rows[0]
    np.testing.assert_array_equal(row.curve("epoch"), [1, 2, 3, 4])
    curve = row.curve("test.accuracy")
    assert curve.shape == (4, 4)
    np.testing.assert_array_equal(np.isnan(curve), [[True, False, True, False]] * 4)


def test_the_sweep_is_in_order_of_strength(run):
    assert [row.lambda_w for row in run.sweep()] == [-0.002, 0.0, 2e-4, 0.02, 0.2]


def test_the_best_row_depends_on_whether_higher_is_better(run, bits):
    assert run.best(run.part("main")).method == "dense"
    assert Run(bits).best(Run(bits).part("main")).method == "dense"


def test_balance_is_the_mean_over_the_most():
    np.testing.assert_allclose(balance(np.array([[1, 3, 2, 2], [4, 4, 4, 4]])), [2 / 3, 1])


def test_blocks_have_numbers_of_their_own(run):
    row = run.find("1x8@0.75", "one_by_n")
    assert row.numbers["balance"].mean == pytest.approx((1 + 2 / 3) / 2)
    assert row.numbers["regrown"].mean == pytest.approx((3 + 2 + 1 + 0) / 4)
    assert "balance" not in run.find("2:4", "dense").numbers


def test_what_is_as_dense_stands_beside_blocks(data):
    names = [(row.pattern, row.method) for row in Run(data).beside("1x4@0.5")]
    assert names == [("2:4", "dense"), ("2:4", "sr_ste"), ("1:2", "sr_ste")]
    assert [row.method for row in Run(data).beside("1x8@0.75")] == ["dense"]
    entry = next(t for t in data["trials"] if (t["pattern"], t["method"]) == ("2:4", "sr_ste"))
    data["trials"].append({**entry, "part": "beside", "pattern": "1:4"})
    data["settings"]["density"]["1:4"] = 0.25
    data["settings"]["weights"]["1:4"] = data["settings"]["weights"]["2:4"]
    assert [row.pattern for row in Run(data).beside("1x8@0.75")] == ["2:4", "1:4"]
    assert Run(data).find("1x8@0.75", "sr_ste").pattern == "1:4"
    assert {row.part for row in Run(data).groups("main")["2:4"]} == {"main"}


def test_the_largest_layer_is_the_last_of_equal_ones(run):
    assert run.largest_layer("1x4@0.5") == "b/kernel"
    run.settings["weights"]["1x4@0.5"] = {"a/kernel": 4, "b/kernel": 4, "c/kernel": 2}
    assert run.largest_layer("1x4@0.5") == "b/kernel"
