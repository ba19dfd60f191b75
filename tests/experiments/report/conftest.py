"""Made-up results of a whole comparison."""

import copy
import dataclasses

import numpy as np
import pytest

from experiments.report.numbers import Run
from experiments.report.page import write_report
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


def made_up():
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


@pytest.fixture
def data():
    return made_up()


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A folder with the page of all results, which takes seconds to draw."""
    folder = tmp_path_factory.mktemp("whole")
    write_report(made_up(), folder)
    return folder


@pytest.fixture
def bits(data):
    """The same results as bits per byte, of a run with AdamW and with texts to show."""
    data = copy.deepcopy(data)
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


@pytest.fixture
def run(data):
    return Run(data)
