"""Sentences about results say what the numbers say, whichever way they come out."""

import numpy as np
import pytest

from experiments.report.numbers import Run, Summary
from experiments.report.sentences import headline, reasons

SEEDS = np.array([0.2, 0.9, 0.4, 0.6])


def set_metric(run, **shifts):
    for method, shift in shifts.items():
        noise = 1e-4 * np.array([1, -1, 1, -1]) * (method == "sr_ste")
        run.find("2:4", method).numbers["metric"] = Summary(tuple(SEEDS + shift + noise))


@pytest.mark.parametrize(
    ("shift", "words"),
    [(0.1, "ahead of STE: +10"), (-0.1, "behind STE: -10"), (0, "not clearly different from STE")],
)
def test_the_headline_says_which_method_is_ahead(run, shift, words):
    set_metric(run, ste=0.0, sr_ste=shift)
    assert headline(run, "2:4").startswith(f"SR-STE is {words}")


def test_the_headline_turns_round_where_lower_is_better(bits):
    run = Run(bits)
    assert headline(run, "2:4").startswith("SR-STE is ahead of STE: -")
    set_metric(run, ste=0.0, sr_ste=0.1)
    assert headline(run, "2:4").startswith("SR-STE is behind STE: +0.1")


def test_what_is_won_back_is_a_share_of_what_was_lost(run, bits):
    for found, sign in ((run, 1), (Run(bits), -1)):
        set_metric(found, dense=0.4 * sign, ste=0.0, sr_ste=0.1 * sign)
        assert any("SR-STE wins back" in s and s.endswith("25%.") for s in reasons(found, "2:4"))
        for sr_ste in (0.0, -0.1 * sign):
            set_metric(found, dense=0.4 * sign, ste=0.0, sr_ste=sr_ste)
            assert not any("wins back" in sentence for sentence in reasons(found, "2:4"))
        # Where STE has lost nothing, there is nothing to win back.
        set_metric(found, dense=-0.1 * sign, ste=0.0, sr_ste=0.1 * sign)
        assert not any("wins back" in sentence for sentence in reasons(found, "2:4"))


def test_exchanges_are_half_the_flips_as_a_share_of_what_is_kept(run):
    for method, flips in (("dense", 0.001), ("ste", 0.004), ("sr_ste", 0.002)):
        run.find("2:4", method).numbers["flip_rate"] = Summary((flips,))
    exchanges = reasons(run, "2:4")[0]
    assert (
        "0.1% of the kept weights with dense training, 0.4% with STE (4.0 times as many)"
        in exchanges
    )
    assert exchanges.endswith("and 0.2% with SR-STE.")
    run.find("2:4", "dense").numbers["flip_rate"] = Summary((0.0,))
    assert "times as many" not in reasons(run, "2:4")[0]


def test_nothing_is_said_about_methods_that_are_missing(data):
    data["trials"] = [t for t in data["trials"] if t["method"] != "dense"]
    assert headline(Run(data), "2:4")
    assert reasons(Run(data), "2:4") == []
    data["trials"] = [t for t in data["trials"] if t["method"] != "ste"]
    assert headline(Run(data), "2:4") == ""
