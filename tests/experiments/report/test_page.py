"""Report and table from results, whole and partial: numbers equal those recomputed by hand."""

import copy
import dataclasses
import re

import numpy as np
import pytest

from experiments.report.figures import draw_all
from experiments.report.findings import Summary, claims, in_words, rows, sweep_rows, total_pull
from experiments.report.page import table_cells, write_report
from experiments.report.reasons import reasons
from experiments.tasks.task import Metric

METHODS = ("dense", "one_shot", "ste", "sr_ste", "sr_ste_negative")
BLOCK_METHODS = ("one_by_n", "subp_l1", "subp")
LEVELS = {"dense": 0.96, "one_shot": 0.9, "ste": 0.89, "sr_ste": 0.92, "sr_ste_negative": 0.6}
LEVELS |= {"one_by_n": 0.8, "subp_l1": 0.86, "subp": 0.85}
SADS = {"dense": 20, "one_shot": 20, "ste": 40, "sr_ste": 30, "sr_ste_negative": 45}
KEPT = {"one_by_n": [1, 3, 2, 2], "subp_l1": [2, 2, 2, 2], "subp": [2, 2, 2, 2]}


def trial(part, pattern, method, lambda_w, rng, seeds=4):
    """Made-up numbers: seeds differ by thousandths, methods by hundredths."""
    epochs = []
    for epoch in (1, 2, 3, 4):
        noise = 0.002 * rng.standard_normal(seeds)
        accuracy = (LEVELS[method] - 0.1 * (4 - epoch) + noise).tolist()
        sad = (SADS.get(method, 30) * epoch // 4 + rng.integers(0, 3, seeds)).tolist()
        epochs.append(
            {
                "epoch": epoch,
                "train_loss": (1 - np.array(accuracy)).tolist(),
                "test": {"accuracy": accuracy, "loss": (1.5 - np.array(accuracy)).tolist()}
                if epoch % 2 == 0
                else {},
                "sad_epoch": sad,
                "sad_first": (2 * np.array(sad)).tolist(),
                "flip_rate": (np.array(sad) / 1e4).tolist(),
                "density": [1.0 if method == "dense" else 0.5] * seeds,
            }
        )
        if epoch % 2 == 0:
            epochs[-1]["sad_layers"] = {"a/kernel": sad, "b/kernel": sad}
        if part == "blocks":
            epochs[-1] |= {"sad_used": sad, "regrown": [4 - epoch] * seeds}
            if epoch % 2 == 0:
                kept = {"a/kernel": [2, 2], "b/kernel": KEPT[method]}
                epochs[-1]["kept_rows"] = {layer: [rows] * seeds for layer, rows in kept.items()}
    return {
        "part": part,
        "pattern": pattern,
        "method": method,
        "lambda_w": lambda_w,
        "seeds": list(range(seeds)),
        "seconds": 1.0,
        "error": "",
        "epochs": epochs,
    }


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    strengths = {"sr_ste": 0.02, "sr_ste_negative": -0.002}
    trials = [
        trial("main", pattern, method, strengths.get(method, 0.0), rng)
        for pattern in ("2:4", "1:2")
        for method in METHODS
    ]
    trials += [trial("sweep", "1:2", "sr_ste", value, rng) for value in (2e-4, 0.2)]
    trials += [trial("shapes", "2:8/kernel", "sr_ste", 0.02, rng)]
    trials += [
        trial("blocks", pattern, method, 0.0, rng)
        for pattern in ("1x4@0.5", "1x8@0.75")
        for method in BLOCK_METHODS
    ]
    weights = {"a/kernel": 64, "b/kernel": 128}
    patterns = ["2:4", "1:2", "2:8/kernel", "1x4@0.5", "1x8@0.75"]
    film = [
        {"epoch": epoch, "layer": "b/kernel", "rows": ["1" * 8, "1" * kept + "0" * (8 - kept)]}
        for epoch, kept in ((2, 8), (4, 4))
    ]
    codes = [["".join(rng.choice(["0", "1"], 9)) for _ in range(4)] for _ in range(4)]
    return {
        "settings": {
            "task": "digits",
            "patterns": ["2:4", "1:2"],
            "block_patterns": ["1x4@0.5", "1x8@0.75"],
            "seeds": [0, 1, 2, 3],
            "recipe": {
                "epochs": 4,
                "batch_size": 8,
                "learning_rate": 0.1,
                "warmup_epochs": 1.0,
                "optimizer": "sgd",
                "schedule": "cosine",
                "clip": 0.0,
                "momentum": 0.9,
                "weight_decay": 5e-5,
                "lambda_w": 0.02,
                "ramp": [0.04, 0.72],
            },
            "steps_per_epoch": 10,
            "metrics": [dataclasses.asdict(Metric())],
            "baselines": {"chance": 0.1},
            "notes": ["Made-up examples."],
            "keep_dense": ["^stem/"],
            "rate_sum": 40 * 0.05,
            "parameters": 500,
            "weights": dict.fromkeys(patterns, weights),
            "blocks": {p: {"a/kernel": 4, "b/kernel": 8} for p in patterns[3:]},
            "density": dict(zip(patterns, (0.5, 0.5, 0.25, 0.5, 0.25), strict=True)),
        },
        "machine": {"processor": "<b>made up</b>", "jax": "0"},
        "trials": trials,
        "films": {f"1x8@0.75 {method}": film for method in BLOCK_METHODS},
        "shapes": {"layer": "a/kernel", "kernels": codes},
        "examples": {"images": rng.random((3, 8, 8)).tolist(), "labels": [1, 2, 3]},
        "step_times": [
            {"pattern": p, "method": m, "milliseconds": 2.0, "ratio": 1.25}
            for p in ("2:4", "1:2")
            for m in METHODS
        ],
    }


def test_rows_are_means_and_errors_of_the_last_epoch(data):
    for row, entry in zip(rows(data), data["trials"], strict=False):
        last = entry["epochs"][-1]
        values = np.array(last["test"]["accuracy"])
        assert row.metric.mean == pytest.approx(values.mean())
        assert row.metric.error == pytest.approx(values.std(ddof=1) / 2)
        assert row.loss.mean == pytest.approx(np.mean(last["test"]["loss"]))
        assert row.sad.mean == pytest.approx(np.mean(last["sad_first"]) / 192)
        flips = [epoch["flip_rate"] for epoch in entry["epochs"]]
        assert row.flip_rate.mean == pytest.approx(np.mean(flips))
        assert row.ratio == 1.25
        cells = table_cells(row)
        assert cells[1] == f"{100 * values.mean():.2f} ± {100 * values.std(ddof=1) / 2:.2f}"


def test_differences_are_paired():
    a, b = Summary((1.0, 2.0, 3.0)), Summary((0.9, 1.9, 2.9))
    assert a.minus(b).mean == pytest.approx(0.1)
    assert a.minus(b).error == pytest.approx(0, abs=1e-12)
    assert a.minus(b).verdict() == "higher"
    assert b.minus(a).verdict() == "lower"
    assert Summary((1.0, -1.0, 0.5)).verdict() == "unclear"
    assert Summary((1.0,)).verdict() == "unclear"
    assert Summary((1.0,)).error == 0


def test_verdicts_follow_students_t():
    """Two seeds: the 95 % margin is 12.706 standard errors."""
    assert Summary((12.8, 10.8)).verdict() == "unclear"
    assert Summary((13.8, 11.8)).verdict() == "higher"


def test_claims_follow_the_numbers(data):
    seen = {claim.says: claim.at["1:2"].seen for claim in claims(data)}
    assert seen["SR-STE is better than STE"] == "seen"
    assert seen["SR-STE comes close to dense (accuracy within 1 points)"] == "not seen"
    for entry in data["trials"]:
        if entry["method"] == "sr_ste":
            for epoch in entry["epochs"]:
                worse = (np.array(epoch["test"].get("accuracy", [])) - 0.5).tolist()
                epoch["test"] = {"accuracy": worse, "loss": worse} if worse else {}
    seen = {claim.says: claim.at["1:2"].seen for claim in claims(data)}
    assert seen["SR-STE is better than STE"] == "opposite"


def test_reasons_say_which_method_is_ahead(data):
    found = {reason.pattern: reason for reason in reasons(data)}
    assert found["2:4"].headline.startswith("SR-STE is ahead of STE: +")
    assert any("wins back" in sentence for sentence in found["2:4"].sentences)


def test_the_sweep_is_in_order_of_strength(data):
    strengths = [row.lambda_w for row in sweep_rows(data)]
    assert strengths == [-0.002, 0.0, 2e-4, 0.02, 0.2]
    assert total_pull(data, 0.02) == pytest.approx(0.02 * 40 * 0.05)


def test_differences_in_words_are_rounded_to_their_error():
    assert in_words("metric", Summary((0.01, 0.03))) == "+2.0 ± 1.0 points"
    assert in_words("loss", Summary((-0.5, -0.5))) == "-0.50 ± 0.00"


def test_page_of_whole_results(data, tmp_path):
    page = write_report(data, tmp_path).read_text()
    for row in rows(data):
        assert table_cells(row)[1] in page
    names = {"examples", "curves", "seeds", "layer_sad", "sad_over_time", "sweep", "shapes"}
    names |= {"block_curves", "block_changes", "block_masks", "balance"}
    assert {picture.name for picture in draw_all(data)} == names
    assert {path.stem for path in tmp_path.glob("*.svg")} == names
    assert page.count("data:image/svg+xml") == len(names)
    assert "&lt;b&gt;made up" in page
    assert "<b>made up" not in page


@pytest.mark.parametrize(
    "count", [0, 2, 11, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 9, 14, 18))]
)
def test_page_of_partial_results(data, tmp_path, count):
    partial = copy.deepcopy(data)
    partial["trials"] = partial["trials"][:count]
    for name in ("step_times", "shapes", "films", "examples"):
        del partial[name]
    page = write_report(partial, tmp_path).read_text()
    for section in ("summary", "run", "table", "paper", "sad", "strength", "machine"):
        assert f'<section id="{section}">' in page
    blocks = [t for t in partial["trials"] if t["part"] == "blocks"]
    # Each block pattern is set beside dense, and 1x4@0.5 beside SR-STE at 2:4 and 1:2.
    beside = {"1x4@0.5": 3, "1x8@0.75": 1}
    shown = len(blocks) + sum(beside[pattern] for pattern in {t["pattern"] for t in blocks})
    assert len(re.findall(r'<span class="dot"', page)) == min(count, 10) + shown
    assert ('<section id="blocks">' in page) == bool(blocks)


@pytest.fixture
def bits(data):
    """The same results as bits per byte, of a run with AdamW and with texts to show."""
    metric = Metric("bits per byte", unit="", step="bits", perfect=0.0, scale=1.0, close=0.02)
    data["settings"]["metrics"] = [dataclasses.asdict(metric)]
    data["settings"]["recipe"] |= {
        "optimizer": "adamw",
        "second_momentum": 0.98,
        "schedule": "inverse_sqrt",
        "clip": 1.0,
        "lambda_decoupled": 0.1,
    }
    data["settings"]["keep_dense"] = []
    for entry in list(data["trials"]):
        for epoch in entry["epochs"]:
            if epoch["test"]:
                better = np.array(epoch["test"].pop("accuracy"))
                epoch["test"]["bits per byte"] = (3 - better).tolist()
        if entry["method"] == "sr_ste" and entry["part"] in ("main", "sweep"):
            twin = copy.deepcopy(entry)
            strength = 10 * entry["lambda_w"]
            data["trials"].append({**twin, "method": "sr_ste_decoupled", "lambda_w": strength})
    data["shown"] = {
        f"2:4 {method}": [{"before": "def f(x):", "network": f"<i>{method}</i>"}]
        for method in ("dense", "ste")
    }
    return data


def test_a_metric_to_lower_turns_every_comparison_round(bits):
    seen = {claim.says: claim.at["1:2"] for claim in claims(bits)}
    assert seen["SR-STE is better than STE"].seen == "seen"
    assert seen["SR-STE is better than STE"].here.startswith("-")
    assert seen["A negative lambda_w makes it worse"].seen == "seen"
    found = {reason.pattern: reason for reason in reasons(bits)}
    assert found["2:4"].headline.startswith("SR-STE is ahead of STE: -")
    assert any(" bits, " in sentence for sentence in found["2:4"].sentences)
    assert any("after the preconditioner" in sentence for sentence in found["2:4"].sentences)


def test_the_page_of_a_metric_to_lower(bits, tmp_path):
    page = write_report(bits, tmp_path).read_text()
    words = " ".join(page.split())
    assert "Without learning: bits per byte chance 0.100" in words
    assert "AdamW with betas 0.9 and 0.98, gradients clipped to a norm of 1, batch 8" in words
    assert "the inverse square root of the step" in words
    assert "Adam divides the gradient" in words
    assert "Dense stay the layers" not in words
    assert "accuracy %" not in re.sub(r"base64,[^\"]*", "", words)
    best = re.findall(r'<tr class="best">\s*<td><span[^>]*></span>([^<]*)', page)
    assert best == ["SR-STE", "SR-STE"]
    assert '<section id="shown">' in page
    assert words.count("<pre>def f(x):</pre>") == 1
    assert "<pre>&lt;i&gt;ste&lt;/i&gt;</pre>" in words
    strengths = [row.lambda_w for row in sweep_rows(bits, decoupled=True)]
    assert strengths == pytest.approx([0, 2e-3, 0.2, 2])


@pytest.mark.slow
def test_pictures_are_the_same_for_the_same_results(data):
    first, second = draw_all(data), draw_all(data)
    assert [picture.svg for picture in first] == [picture.svg for picture in second]


def test_a_stopped_trial_is_named_and_left_out_of_the_table(data, tmp_path):
    data["trials"][3]["error"] = "the loss of seed 0 is not finite"
    assert len(rows(data)) == 9
    assert "is not finite" in write_report(data, tmp_path).read_text()


def test_what_networks_do_is_shown_as_text_or_as_pictures(data, tmp_path):
    uri = "data:image/jpeg;base64,"
    data["shown"] = {
        "2:4 dense": [
            {"said": "one", "network": "two"},
            {"truth": uri + "AA", "network": uri + "BB"},
        ],
        "2:4 sr_ste": [
            {"said": "one", "network": "three"},
            {"truth": uri + "AA", "network": uri + "CC"},
        ],
    }
    page = write_report(data, tmp_path).read_text()
    assert "<pre>three</pre>" in page
    for name, content in (("truth", "AA"), ("2:4 dense", "BB"), ("2:4 sr_ste", "CC")):
        assert f'<img src="{uri}{content}" alt="{name}">' in page
