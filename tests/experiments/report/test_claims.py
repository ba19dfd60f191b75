"""Verdicts by hand, and every claim with data for it, against it, and undecided."""

import numpy as np
import pytest

from experiments.report.claims import CLAIMS, judge, verdict
from experiments.report.numbers import Run, Summary

# Seeds differ by more than the methods do, so that only pairing makes a difference clear.
SEEDS = np.array([0.2, 0.9, 0.4, 0.6])


def seen(run, pattern):
    return {finding.says: finding.at[0].seen for finding in judge(run, [pattern])}


def test_verdicts_need_several_seeds():
    assert Summary((0.1, 0.11)).minus(Summary((0.0, 0.01))).mean == pytest.approx(0.1)
    assert verdict(Summary((0.1, 0.1 + 1e-9))) == "higher"
    assert verdict(Summary((-0.1, -0.1 + 1e-9))) == "lower"
    assert verdict(Summary((1.0, -1.0, 0.5))) == "unclear"
    assert verdict(Summary((1.0,))) == "unclear"
    assert verdict(Summary((0.0, 0.0))) == "unclear"


def test_verdicts_follow_students_t():
    """Two seeds: the 95 % margin is 12.706 standard errors."""
    assert verdict(Summary((12.8, 10.8))) == "unclear"
    assert verdict(Summary((13.8, 11.8))) == "higher"


def test_a_margin_moves_the_threshold():
    assert verdict(Summary((-0.5, -0.51))) == "lower"
    assert verdict(Summary((-0.5, -0.51)), margin=1.0) == "higher"
    assert verdict(Summary((-1.5, -1.51)), margin=1.0) == "lower"
    assert verdict(Summary((-1.5, -0.51)), margin=1.0) == "unclear"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.says)
@pytest.mark.parametrize("results", ["data", "bits"])
def test_every_claim_can_come_out_either_way(claim, results, request):
    data = request.getfixturevalue(results)
    for entry in list(data["trials"]):
        if entry["part"] == "main" and entry["method"] == "sr_ste":
            data["trials"].append({**entry, "method": "sr_ste_decoupled"})
    run = Run(data)
    pattern = "1x4@0.5" if claim.method.startswith("subp") else "1:2"
    method, other = run.find(pattern, claim.method), run.find(pattern, claim.other)
    up = (1 if claim.expected == "higher" else -1) * (
        run.metric.sign if claim.number == "metric" else 1
    )
    noise = 1e-4 * np.array([1, -1, 1, -1])
    other.numbers[claim.number] = Summary(tuple(SEEDS))
    for shift, expected in ((up, "seen"), (-up, "opposite")):
        values = SEEDS + 0.1 * shift + noise
        method.numbers[claim.number] = Summary(tuple(values))
        found = [f for f in judge(run, [pattern]) if f.says.startswith(claim.says)]
        assert [f.at[0].seen for f in found] == [expected]
        assert found[0].at[0].here.startswith("+" if shift > 0 else "-")
    # With the threshold in the middle of the seeds, nothing is clear.
    threshold = -run.metric.sign * run.metric.close if claim.close else 0.0
    method.numbers[claim.number] = Summary(tuple(SEEDS + threshold + noise))
    found = [f for f in judge(run, [pattern]) if f.says.startswith(claim.says)]
    assert [f.at[0].seen for f in found] == ["not clear"]


def test_a_small_loss_against_dense_still_is_close(run):
    says = "SR-STE comes close to dense (within 1 point)"
    sparse = run.find("2:4", "sr_ste")
    for method in ("dense", "ste"):
        run.find("2:4", method).numbers["metric"] = Summary(tuple(SEEDS))
    sparse.numbers["metric"] = Summary(tuple(SEEDS - 0.005 + [0, 1e-4, 0, 1e-4]))
    assert seen(run, "2:4")[says] == "seen"
    assert seen(run, "2:4")["SR-STE is better than STE"] == "opposite"
    sparse.numbers["metric"] = Summary(tuple(SEEDS - 0.015 + [0, 1e-4, 0, 1e-4]))
    assert seen(run, "2:4")[says] == "opposite"


def test_claims_follow_the_results_file(data, bits):
    assert seen(Run(bits), "1:2")["SR-STE is better than STE"] == "seen"
    assert seen(Run(bits), "1x4@0.5")["Ranking by angle and norm is better than by norm"] == (
        "opposite"
    )


def test_blocks_name_the_pattern_that_they_are_compared_with(run):
    found = {f.says: f for f in judge(run, ["1x4@0.5", "1x8@0.75"])}
    beside = found["SUBP is worse than SR-STE at the same density"].at
    assert beside[0].here.endswith("points (at 2:4)")
    assert beside[0].seen == "seen"
    assert beside[1] is None


def test_claims_that_nothing_allows_to_test_are_left_out(data):
    data["trials"] = [t for t in data["trials"] if t["method"] in ("dense", "ste")]
    compared = {(claim.method, claim.other) for claim in CLAIMS}
    assert ("ste", "dense") in compared
    says = [finding.says for finding in judge(Run(data), ["2:4", "1:2"])]
    assert len(says) == len([c for c in CLAIMS if {c.method, c.other} == {"ste", "dense"}])
    assert judge(Run(data), ["1x4@0.5"]) == []
    assert judge(Run(data), []) == []


def test_stopped_trials_are_compared_with_nothing(data):
    data["trials"][3]["error"] = "the loss of seed 0 is not finite"
    found = {f.says: f for f in judge(Run(data), ["2:4", "1:2"])}
    assert found["SR-STE is better than STE"].at[0] is None
    assert found["SR-STE is better than STE"].at[1].seen == "seen"
