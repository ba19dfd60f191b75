"""Balance, its bound on threads, and the claims about blocks, by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.report.block_findings import (
    balance,
    beside,
    block_claims,
    block_tables,
    largest_layer,
    price_sentences,
    speed_up_bound,
)
from tests.experiments.report.test_page import data  # noqa: F401

kept_blocks = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any).map(np.array)


@given(kept_blocks, st.integers(1, 16))
def test_the_bound_is_that_of_the_slowest_thread(kept, threads):
    """Rows are dealt out one after the other; the first threads get one more."""
    several, more = divmod(len(kept), min(threads, len(kept)))
    rows, work = iter(kept.tolist()), []
    for thread in range(min(threads, len(kept))):
        work.append(sum(next(rows) for _ in range(several + (thread < more))))
    assert speed_up_bound(kept, threads) == pytest.approx(sum(kept) / max(work))
    assert 1 <= speed_up_bound(kept, threads) <= threads


@given(st.integers(1, 9), st.integers(1, 12))
def test_equal_rows_are_in_balance_and_reach_as_many_threads_as_divide_them(kept, rows):
    equal = np.full(rows, kept)
    assert balance(equal) == 1
    for threads in range(1, rows + 1):
        if rows % threads == 0:
            assert speed_up_bound(equal, threads) == pytest.approx(threads)


def test_balance_is_the_mean_over_the_most():
    np.testing.assert_allclose(balance(np.array([[1, 3, 2, 2], [4, 4, 4, 4]])), [2 / 3, 1])


def test_tables_set_blocks_beside_what_is_as_dense(data):  # noqa: F811
    tables = block_tables(data)
    names = {
        pattern: [(row.row.pattern, row.row.method) for row in table]
        for pattern, table in tables.items()
    }
    blocks = ("one_by_n", "subp_l1", "subp")
    assert names["1x4@0.5"][:3] == [("2:4", "dense"), ("2:4", "sr_ste"), ("1:2", "sr_ste")]
    assert names["1x4@0.5"][3:] == [("1x4@0.5", method) for method in blocks]
    assert names["1x8@0.75"][:1] == [("2:4", "dense")]
    found = tables["1x8@0.75"][-3]
    assert (found.layer, found.kept) == ("b/kernel", (1, 3, 8))
    assert found.balance.mean == pytest.approx((1 + 2 / 3) / 2)
    assert found.regrown.mean == pytest.approx((3 + 2 + 1 + 0) / 4)
    assert tables["1x4@0.5"][0].balance is None


def test_methods_that_remember_no_blocks_have_the_plain_columns_only(data):  # noqa: F811
    entry = next(t for t in data["trials"] if t["part"] == "blocks")
    epochs = [
        {k: v for k, v in e.items() if k not in ("regrown", "kept_rows")} for e in entry["epochs"]
    ]
    data["trials"].append({**entry, "method": "ste", "epochs": epochs})
    found = block_tables(data)[entry["pattern"]][-1]
    assert (found.row.method, found.layer, found.balance, found.regrown) == ("ste", "", None, None)


def test_patterns_trained_for_their_density_stand_beside(data):  # noqa: F811
    entry = next(t for t in data["trials"] if (t["pattern"], t["method"]) == ("2:4", "sr_ste"))
    data["trials"].append({**entry, "part": "beside", "pattern": "1:4"})
    data["settings"]["density"]["1:4"] = 0.25
    data["settings"]["weights"]["1:4"] = data["settings"]["weights"]["2:4"]
    assert [row.pattern for row in beside(data, "1x8@0.75")] == ["2:4", "1:4"]
    assert any("SR-STE at 1:4" in sentence for sentence in price_sentences(data))


def test_claims_follow_the_numbers(data):  # noqa: F811
    seen = {claim.says: claim.at["1x4@0.5"].seen for claim in block_claims(data)}
    assert seen["SUBP is better than one-shot 1xN"] == "seen"
    assert seen["Ranking by angle too is better than by norm"] == "opposite"
    assert seen["SUBP gives every row equal work, one-shot 1xN does not"] == "seen"
    for entry in data["trials"]:
        if entry["method"] == "subp":
            entry["epochs"][-1]["kept_rows"]["b/kernel"][0] = [1, 2, 2, 2]
    seen = {claim.says: claim.at["1x4@0.5"].seen for claim in block_claims(data)}
    assert seen["SUBP gives every row equal work, one-shot 1xN does not"] == "not seen"


def test_without_blocks_there_is_nothing_to_say(data):  # noqa: F811
    data["trials"] = [t for t in data["trials"] if t["part"] != "blocks"]
    assert block_tables(data) == {}
    assert block_claims(data) == []
    assert price_sentences(data) == []


def test_the_largest_layer_is_the_last_of_equal_ones(data):  # noqa: F811
    assert largest_layer(data, "1x4@0.5") == "b/kernel"
    data["settings"]["weights"]["1x4@0.5"] = {"a/kernel": 4, "b/kernel": 4, "c/kernel": 2}
    assert largest_layer(data, "1x4@0.5") == "b/kernel"
